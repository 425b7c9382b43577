"""Serves the metrics of a run to Prometheus while it trains."""

from __future__ import annotations

import time

from msf_faiss.errors import UserError
from msf_faiss.run.events import CheckpointSaved, Event, RunEnded, RunStarted, TrainingProgress

_METRICS = {
    "step": "Finished steps.",
    "epoch": "Finished epochs.",
    "loss": "Mean-shift loss.",
    "purity": "Ratio of neighbours with the query's label, own image excluded.",
    "learning_rate": "Learning rate.",
    "images_per_second": "Throughput over all ranks.",
    "eta_seconds": "Estimated seconds until the run ends.",
    "data_time_ratio": "Ratio of the time spent waiting for data and augmenting.",
    "bank_time_ratio": "Ratio of the time spent on the bank.",
    "bank_fill_ratio": "Ratio of the bank's slots that are filled.",
    "recall_at_k": "Recall of an approximate bank.",
    "neighbor_age_mean": "Mean age of the neighbours, in entries pushed since.",
    "embedding_std": "Mean standard deviation per dimension times sqrt(D): 1 evenly spread, 0 collapsed.",
    "effective_rank": "Effective rank of the newest embeddings.",
    "unreadable_images": "Unreadable images skipped so far.",
    "total_steps": "Steps of the whole run.",
    "training": "1 while the run trains, 0 when it has ended.",
    "last_event_timestamp_seconds": "Unix time of the last event.",
    "checkpoint_step": "Step of the last checkpoint.",
    "checkpoint_timestamp_seconds": "Unix time of the last checkpoint.",
    "collapsing_since": "Step at which the embeddings began to collapse, or -1.",
}


class MetricsServer:
    """Serves /metrics over HTTP within its context; call it with each event, in order.

    Args:
        port: 0 selects a free port, see the attribute `port`.
        address: to listen at.

    Raises:
        UserError: if prometheus-client is not installed, or the port is in use.
    """

    def __init__(self, port: int, address: str) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise UserError(
                "--metrics-port needs the package prometheus-client. Run pip install 'msf-faiss[metrics]'"
            ) from error
        registry = prometheus_client.CollectorRegistry()
        self._gauges = {
            name: prometheus_client.Gauge(f"msf_faiss_{name}", text, registry=registry)
            for name, text in _METRICS.items()
        }
        self._set(collapsing_since=-1)
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, address, registry)
        except OSError as error:
            raise UserError(
                f"--metrics-port {port}: cannot listen at {address}: {error.strerror}. Choose another port"
            ) from error
        self.port: int = self._server.server_port

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._set(total_steps=event.total_steps, step=event.first_step, training=1)
            case TrainingProgress():
                since = -1 if event.collapsing_since is None else event.collapsing_since
                self._set(**event.metrics() | {"collapsing_since": since})
            case CheckpointSaved():
                self._set(checkpoint_step=event.step, checkpoint_timestamp_seconds=time.time())
            case RunEnded():
                self._set(training=0)
            case _:
                pass
        self._set(last_event_timestamp_seconds=time.time())

    def _set(self, **values: float | None) -> None:
        for name, value in values.items():
            if name in self._gauges and value is not None:
                self._gauges[name].set(value)
