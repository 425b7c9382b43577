import sys
from types import ModuleType

import pytest

from msf_faiss.data.sources.optional import import_optional
from msf_faiss.errors import UserError


def test_import_optional_names_the_package_and_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "some", ModuleType("some"))
    monkeypatch.setitem(sys.modules, "some.part", None)
    assert import_optional("some", "webdataset") is sys.modules["some"]
    with pytest.raises(UserError, match=r"data\.kind=webdataset needs the package some: pip install 'msf-faiss\[web"):
        import_optional("some.part", "webdataset")
