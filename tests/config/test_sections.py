from msf_faiss.config import FolderData
from msf_faiss.config.sections import SECTIONS, dotted, key_of


def test_sections_contains_every_section_and_kind() -> None:
    assert {dotted(key) for key in SECTIONS} == {
        "",
        *("data", "views", "views.weak", "views.strong", "model", "model.backbone"),
        *("bank", "bank.ivf", "bank.recall_check", "optimizer", "target", "train", "checkpoint", "knn"),
    }
    data = SECTIONS["data",]
    assert list(data.models) == [
        *("demo", "folder", "parquet", "webdataset", "huggingface", "cifar10", "cifar100", "stl10")
    ]
    assert data.models["folder"] is FolderData
    assert data.shared == {"kind", "workers", "cache", "unreadable", "unreadable_limit", "max_pixels"}
    assert SECTIONS["model", "backbone"].default == "torchvision"


def test_key_of_drops_kinds_and_members_of_unions() -> None:
    assert key_of(("data", "folder", "path")) == ("data", "path")
    assert key_of(("model", "backbone", "narrow", "depths", 2)) == ("model", "backbone", "depths", 2)
    assert key_of(("bank", "flat", "capacity", "constrained-int")) == ("bank", "capacity")
    assert key_of(("views", "weak", "crop_scale", 1)) == ("views", "weak", "crop_scale", 1)


def test_dotted() -> None:
    assert dotted(("views", "weak", "crop_scale", 0)) == "views.weak.crop_scale[0]"
    assert dotted(("a", "", "b")) == "a.''.b"
