"""`--runner=FlinkRunner`: Beam's runner, with its job server started and ended by the launcher.

Beam's own takes over Ctrl-C, which only works in the main thread, and would end the job server on the first one; a
launcher that drains still needs it then.
"""

import atexit
from typing import Any

from apache_beam.options.pipeline_options import FlinkRunnerOptions, PipelineOptions
from apache_beam.runners.portability import flink_runner


class FlinkRunner(flink_runner.FlinkRunner):
    """Starts the job server of `--flink_job_server_jar`; it lives as long as the launcher."""

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
