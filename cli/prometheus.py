"""A run's gauges for Prometheus, served while it trains."""

from __future__ import annotations

import time
from dataclasses import asdict
from types import TracebackType

from msf_faiss.errors import UserError
from msf_faiss.run.events import CheckpointSaved, Event, RunEnded, RunStarted, TrainingProgress

_STEP_GAUGES = {
    "step": "Finished steps.",
    "epoch": "Finished epochs.",
    "loss": "Mean-shift loss, mean since the report before.",
    "purity": "Share of the neighbours with the query's label, the query's own image left out.",
    "learning_rate": "Learning rate.",
    "images_per_second": "Images a second, on all ranks.",
    "eta_seconds": "Seconds until the run ends, at the mean rate.",
    "data_time_ratio": "Share of the time spent waiting for data.",
    "bank_time_ratio": "Share of the time spent on the bank.",
    "bank_fill_ratio": "Filled share of the bank.",
    "recall_at_k": "Recall of an approximate bank.",
    "neighbor_age_mean": "Mean age of the neighbours, in entries pushed since.",
    "embedding_std": "Mean deviation of an embedding's dimension times sqrt(D): 1 evenly spread, 0 collapsed.",
    "effective_rank": "Effective rank of the newest embeddings.",
    "unreadable_images": "Images left out because they cannot be read.",
}


class MetricsServer:
    """Serves /metrics over HTTP while its context lasts; call it with each report, in order.

    Args:
        port: 0 takes a free one, see `port`.
        address: to listen at.

    Raises:
        UserError: if prometheus-client is not installed, or the port is taken.
    """

    def __init__(self, port: int, address: str) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise UserError(
                "--metrics-port needs the package prometheus-client: pip install 'msf-faiss[metrics]'"
            ) from error
        registry = prometheus_client.CollectorRegistry()

        def gauge(name: str, text: str) -> prometheus_client.Gauge:
            return prometheus_client.Gauge(f"msf_faiss_{name}", text, registry=registry)

        self._steps = {name: gauge(name, text) for name, text in _STEP_GAUGES.items()}
        self._total = gauge("total_steps", "Steps of the whole run.")
        self._training = gauge("training", "1 while the run trains, 0 when it has ended.")
        self._heard = gauge("last_report_timestamp_seconds", "Unix time of the last report.")
        self._saved_step = gauge("checkpoint_step", "Step of the last checkpoint.")
        self._saved_time = gauge("checkpoint_timestamp_seconds", "Unix time of the last checkpoint.")
        self._collapse = gauge("collapsing_since", "Step at which the embeddings began to collapse, or -1.")
        self._collapse.set(-1)
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, address, registry)
        except OSError as error:
            raise UserError(
                f"--metrics-port {port}: cannot listen at {address}: {error.strerror}; choose another port"
            ) from error
        self.port: int = self._server.server_port

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __call__(self, report: Event) -> None:
        match report:
            case RunStarted():
                self._total.set(report.total_steps)
                self._steps["step"].set(report.first_step)
                self._training.set(1)
            case TrainingProgress():
                values = asdict(report)
                for name, gauge in self._steps.items():
                    if values[name] is not None:
                        gauge.set(values[name])
                self._collapse.set(-1 if report.collapsing_since is None else report.collapsing_since)
            case CheckpointSaved():
                self._saved_step.set(report.step)
                self._saved_time.set(time.time())
            case RunEnded():
                self._training.set(0)
            case _:
                pass
        self._heard.set(time.time())
