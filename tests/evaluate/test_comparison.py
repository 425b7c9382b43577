from typing import Any

import pytest

from msf_faiss.evaluate.comparison import compare, describe_data
from msf_faiss.evaluate.results import EvalEncoder, EvaluationName, Result, Score

DATA = {
    "config": {"kind": "demo"},
    "training_images": 4000,
    "held_out_images": 1000,
    "classes": 10,
    "commonest_class": 0.104,
}


def knn(k: int, accuracy: float, temperature: float | None = None) -> Score:
    name = f"{k}-NN" if temperature is None else f"{k}-NN, T {temperature:g}"
    settings = {"k": k, "temperature": temperature}
    return Score(metric=name, accuracy=accuracy, correct=round(accuracy * 1000), images=1000, settings=settings)


def probe(accuracy: float, name: str = "linear", top: int = 1) -> Score:
    correct = round(accuracy * 1000)
    return Score(metric=name, accuracy=accuracy, correct=correct, images=1000, settings={"top": top})


def result(
    encoder: EvalEncoder,
    *scores: Score,
    step: int | None = None,
    data: dict[str, Any] = DATA,
    evaluation: EvaluationName = "knn",
) -> Result:
    trained = encoder in ("online", "target")
    return Result(
        evaluation=evaluation,
        encoder=encoder,
        checkpoint="checkpoints/step" if trained else None,
        weights=f"1a2b-{step}" if trained else None,
        step=step,
        epoch=None if step is None else step / 10,
        scores=scores,
        protocol={"data": data, "view": {"center_crop": 32}},
        created="2026-01-01T00:00:00+00:00",
        device="cpu",
        seconds=1.0,
        versions={},
    )


def test_order_of_rows_and_columns() -> None:
    comparisons = compare(
        [
            result("pixels", knn(20, 0.37)),
            result("online", probe(0.9, "linear, top 5", 5), probe(0.6), step=12, evaluation="linear"),
            result("untrained", knn(20, 0.26), knn(1, 0.25), knn(20, 0.27, 0.07), step=0),
            result("online", knn(20, 0.53, 0.1), knn(20, 0.52), knn(100, 0.4), knn(20, 0.55, 0.07), step=12),
            result("target", knn(20, 0.5), step=12),
        ]
    )
    assert len(comparisons) == 1
    assert (comparisons[0].step, comparisons[0].epoch) == (12, 1.2)
    assert comparisons[0].encoders == ("online", "target", "untrained", "pixels")
    metrics = ["1-NN", "20-NN", "20-NN, T 0.07", "20-NN, T 0.1", "100-NN", "linear", "linear, top 5"]
    assert list(comparisons[0].scores) == metrics
    assert comparisons[0].gain("20-NN") == pytest.approx(26)
    assert comparisons[0].gain("20-NN, T 0.07") == pytest.approx(28)
    assert comparisons[0].gain("1-NN") is None
    assert comparisons[0].gain("linear") is None


def test_gain_uses_the_target_if_online_is_missing() -> None:
    comparisons = compare([result("target", knn(1, 0.5), step=3), result("untrained", knn(1, 0.6), step=0)])
    assert comparisons[0].gain("1-NN") == pytest.approx(-10)


def test_each_step_is_compared_with_the_untrained_network() -> None:
    comparisons = compare(
        [
            result("online", knn(1, 0.5), step=200),
            result("untrained", knn(1, 0.2), step=0),
            result("online", knn(1, 0.4), step=100),
        ]
    )
    assert [(each.step, each.epoch) for each in comparisons] == [(100, 10), (200, 20)]
    assert [each.gain("1-NN") for each in comparisons] == pytest.approx([20, 30])


def test_other_images_give_another_comparison() -> None:
    fewer = {**DATA, "held_out_images": 10}
    comparisons = compare([result("online", knn(1, 0.5), step=2), result("untrained", knn(1, 0.2), step=0, data=fewer)])
    assert [(each.step, each.encoders) for each in comparisons] == [(2, ("online",)), (None, ("untrained",))]


def test_the_newest_result_counts() -> None:
    comparisons = compare([result("online", knn(1, 0.5), step=2), result("online", knn(1, 0.6), knn(2, 0.1), step=2)])
    assert comparisons[0].scores["1-NN"]["online"].accuracy == 0.6
    assert compare([]) == []


def test_describe_data() -> None:
    assert describe_data(DATA) == (
        "demo: 1,000 held-out images, 4,000 training images; 10 classes, chance 10.0%, majority class 10.4%"
    )
    config = {"kind": "folder", "path": "photos", "test_path": "more"}
    assert describe_data({**DATA, "config": config}).startswith("more: 1,000 held-out")
    assert describe_data({**DATA, "config": config, "held_out_images": None}).startswith(
        "photos: 4,000 training images, leave-one-out;"
    )
