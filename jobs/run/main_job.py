"""Splits a checked job into the parts from which the pipeline of an attempt is built."""

import time
from importlib.metadata import version
from pathlib import Path

from moebeam.jobs.check.preflight import CheckedJob
from moebeam.pipelines.main_job import MainJob
from moebeam.schemas.canonical import Json
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import result_schema
from moebeam.transforms.answer.answer_shard import AnswerSpec
from moebeam.transforms.answer.budget import SpendingLimits
from moebeam.transforms.money.account import Accounting
from moebeam.transforms.plan.build_shards import PlanSpec
from moebeam.transforms.plan.plan_record import PlanRecord
from moebeam.transforms.publish.publish_spec import PublishSpec

_VIEWS = Path(__file__).parent / "sql" / "views.sql"
"""DuckDB views over a run's tables, with paths relative to its output folder."""


def make_main_job(checked: CheckedJob, planned: PlanRecord | None, run_key: str = "") -> MainJob:
    """Split a checked job into the parts of its stages.

    Args:
        planned: an earlier attempt's plan, if any.
        run_key: as `CheckedJob.claim_output` returns it.
    """
    job, scan, columns = checked.request.job, checked.scan, checked.columns
    layout = RunLayout(job.output.path)
    run_id, section = checked.identity.run_id, job.accounting
    tag_fields = tuple(map(job.input.passthrough.name_output, section.tag_columns))
    accounting = Accounting(run_id, checked.prices, section.provider, section.model, section.tag_columns, tag_fields)
    return MainJob(
        scan=scan,
        columns=columns,
        render=checked.render_spec,
        plan=PlanSpec(
            checked.plan_section,
            layout,
            columns.output_fields,
            group_starts=tuple(group.units[0].ordinal for group in scan.groups),
        ),
        answer=AnswerSpec(
            layout=layout,
            engine=checked.engine.config,
            terms=checked.terms,
            accounting=accounting,
            repair=job.repair,
            schema_in_prompt=job.output.schema_in_prompt,
            is_constrained=job.output.constrain == "auto",
            output_type=checked.output_type,
            limits=SpendingLimits.from_section(job.limits, time.time()),
            failures=job.failures,
            reuse=checked.request.reuse,
            run_key=run_key,
        ),
        publish=PublishSpec(
            run_id,
            layout,
            result_schema(columns.output_fields, checked.output_type and checked.output_type.arrow),
            scan.num_rows,
            _describe_run(checked),
            accounting,
            _VIEWS.read_text(encoding="utf-8"),
        ),
        has_ids=checked.has_ids,
        planned=planned,
        resources=job.model.resource_hints,
    )


def _describe_run(checked: CheckedJob) -> dict[str, Json]:
    """The manifest entries that are known before any row is answered."""
    request, scan, engine = checked.request, checked.scan, checked.engine.config
    retry, reuse = request.retry_of, request.reuse
    return {
        "product_version": version("moebeam"),
        "job_fingerprint": checked.identity.fingerprint,
        "input": {
            "path": [*request.job.input.paths] if isinstance(request.job.input.path, tuple) else request.job.input.path,
            "query": request.job.input.query,
            "format": scan.format,
            "num_files": scan.num_files,
            "num_rows": scan.num_rows,
            "fingerprint": scan.fingerprint,
            "limit": request.limit,
        },
        "model": {"engine": engine.engine, "name": engine.name, "revision": engine.revision},
        "price_book": checked.prices.version if checked.prices else None,
        "retry_of": retry and {"output": retry.output, "run_id": retry.run_id, "kinds": list(retry.kinds)},
        "reuse": reuse and {"output": reuse.output, "run_id": reuse.run_id},
        "warnings": list(checked.warnings),
    }
