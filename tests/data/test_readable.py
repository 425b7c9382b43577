import numpy as np
import pytest
from fake_source import FakeSource, config

from msf_faiss.data.readable import add_unreadable, decode_readable, list_problems
from msf_faiss.data.source import UnreadableImageError
from msf_faiss.errors import UserError

IDS = np.array([2, 0, 3, 2])


def test_decode_readable_leaves_unreadable_images_out() -> None:
    found = decode_readable(FakeSource(4, bad=[0]), IDS, config(unreadable="skip").data)
    assert found.ids.tolist() == [2, 3, 2]
    assert [image.shape[1] for image in found.images] == [22, 23, 22]
    assert found.unreadable == {0: "fake 0: cannot read this image: it is bad"}


def test_decode_readable_raises_for_an_unreadable_image() -> None:
    with pytest.raises(UnreadableImageError, match=r"^fake 0: .*it is bad; repair .* set data\.unreadable=skip$"):
        decode_readable(FakeSource(4, bad=[0]), IDS, config().data)


def test_more_unreadable_images_than_the_limit() -> None:
    known, settings = {1: "one"}, config(unreadable_limit=2).data
    add_unreadable(known, {1: "one", 7: "seven"}, settings)
    assert known == {1: "one", 7: "seven"}
    with pytest.raises(
        UserError, match=r"^3 images are unreadable, more than data\.unreadable_limit \(2\); .*limit:\n  one\n  seven\n"
    ):
        add_unreadable(known, {9: "nine"}, settings)


def test_list_problems_shows_the_first_five() -> None:
    assert list_problems({index: f"p{index}" for index in range(7)}) == "\n  p0\n  p1\n  p2\n  p3\n  p4\n  and 2 more"
