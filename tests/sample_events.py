"""The first event of a run, and a progress event."""

from pathlib import Path

from msf_faiss.run.events import RunStarted, TrainingProgress

STARTED = RunStarted(
    run_dir=Path("runs/one"),
    device="cpu (1 threads)",
    images=4000,
    classes=None,
    parameters=1_500_000,
    feature_dim=128,
    embedding_dim=32,
    bank="FlatBank(0 of 1,000 entries, dim 32, torch.float32, cpu, engine torch)",
    engine_ms={"torch": 1.234, "faiss": 20.5},
    notes=("the bank is another one", "and so is the moon"),
    steps_per_epoch=10,
    total_steps=50,
    first_step=5,
)
PROGRESS = TrainingProgress(
    step=6,
    epoch=0.6,
    loss=1.25,
    purity=None,
    learning_rate=0.05,
    ema_momentum=0.99,
    bank_fill_ratio=0.5,
    neighbor_age_mean=1234.5,
    neighbor_age_p95=4321.0,
    hubness=0.034,
    recall_at_k=0.98765,
    embedding_std=0.876,
    effective_rank=25.4,
    collapsing_since=None,
    push_ms=0.1234,
    search_ms=12.345,
    bank_metrics={"list_imbalance": 1.5, "proved_ratio": 1.0},
    images_per_second=2000.0,
    data_time_ratio=0.1,
    bank_time_ratio=0.2,
    model_time_ratio=0.7,
    eta_seconds=61,
    unreadable_images=0,
)
