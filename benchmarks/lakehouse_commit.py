"""How long a run of 1,000 shards takes to commit, beside pyiceberg's own `add_files` of the same files.

    python -m benchmarks.lakehouse_commit [--files 1000] [--rows 100]

Prints a line for each format: seconds for all three tables, each of that many files.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from moebeam.schemas.lakehouse.table_url import parse_table_url
from moebeam.transforms.publish.lakehouse.commit_run import commit_run
from tests.support.jobs.published_runs import make_catalog, make_url, publish_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PYICEBERG_CATALOG__LOCAL__URI"] = f"sqlite:///{folder}/catalog/catalog.db"
        os.environ["PYICEBERG_CATALOG__LOCAL__WAREHOUSE"] = f"file://{folder}/catalog/warehouse"
        catalog = make_catalog(folder / "catalog")
        columns = {
            "tenant": ["a"] * options.rows,
            "text": [f"an answer of some length {n}" for n in range(options.rows)],
        }
        run = publish_run(folder / "run", "run", columns, num_shards=options.files)
        from pyiceberg import catalog as catalogs
        from pyiceberg.utils.config import Config

        catalogs._ENV_CONFIG = Config()  # pyiceberg has read the environment when it was imported
        for kind in ("iceberg", "delta"):
            started = time.perf_counter()
            commit_run(run.layout, run.manifest, run.schema, parse_table_url(make_url(kind, folder)))
            print(f"{kind}: {time.perf_counter() - started:.1f} s")
        paths = [f"file://{run.layout.output}/{file['path']}" for file in run.manifest["files"]["results"]]
        table = catalog.create_table("db.theirs", run.schema)
        started = time.perf_counter()
        table.add_files(paths)
        print(f"add_files of the results alone: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
