"""`--runner=FlinkRunner`: Beam's runner, with a job server owned by the launcher.

Beam's own starter handles Ctrl-C, which works only in the main thread, and stops the job server on the first one, while
a draining launcher still needs it.
"""

import atexit
from typing import Any

from apache_beam.options.pipeline_options import FlinkRunnerOptions, PipelineOptions
from apache_beam.runners.portability import flink_runner


class FlinkRunner(flink_runner.FlinkRunner):
    """Starts the job server of `--flink_job_server_jar`, which lives as long as the launcher."""

    def default_job_server(self, options: PipelineOptions) -> Any:
        flink = options.view_as(FlinkRunnerOptions)
        if flink.flink_submit_uber_jar:
            return super().default_job_server(options)
        flink.flink_master = self.add_http_scheme(str(flink.flink_master))
        return _LastingJobServer(options)


class _LastingJobServer(flink_runner.FlinkJarJobServer):
    def start(self) -> Any:
        service = super().start()
        atexit.register(self.stop)
        return service
