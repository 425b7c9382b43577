"""The lists of a bank follow its ring through rotations, with one segment and with several."""

import ctypes

import pytest
import torch
from clusters import BATCH, CAPACITY, DIM, SPEC, Clusters, batches, drift, filled
from torch import Tensor

from msf_faiss.bank import IvfBank
from msf_faiss.bank.ivf.inverted_lists import InvertedLists
from msf_faiss.search.faiss_setup import faiss


@pytest.mark.parametrize("segments", [1, 4])
def test_lists_have_each_slot_once_after_rotations(segments: int) -> None:
    bank = filled(steps=150, segments=segments)
    state = bank.state_dict()
    parts = [state[f"index.lists.part{number}.places"] for number in range(segments)]
    leaving = state["index.lists.leaving.places"] if segments > 1 else torch.empty(0)
    assert sum(len(places) for places in parts) == CAPACITY - len(leaving)
    for places in parts:
        assert torch.equal(places.sort().values.long(), torch.arange(len(places)))
    if segments > 1:  # entries that the newest segment has yet to overwrite
        newest = len(parts[bank.pushed % CAPACITY // 750])
        assert torch.equal(leaving.sort().values.long(), torch.arange(newest, 750))


def contents(part: InvertedLists, first: int) -> dict[int, tuple[int, bytes]]:
    """List and code, in FAISS, of each place from `first` on."""
    lists, entries = part._index.invlists, {}
    for number in range(lists.nlist):
        if size := lists.list_size(number):
            places = faiss.rev_swig_ptr(lists.get_ids(number), size)
            codes = faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size).reshape(size, -1)
            here = {int(place): (number, code.tobytes()) for place, code in zip(places, codes, strict=True)}
            assert len(here) == size
            assert not here.keys() & entries.keys()
            entries |= here
    return {place: entry for place, entry in entries.items() if place >= first}


@pytest.mark.parametrize("segments", [1, 4])
def test_updated_lists_equal_rebuilt_lists(segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same codes in the same lists as in an index built from the ring and the lists assigned at each push."""
    write = InvertedLists.write

    def write_and_record(self: InvertedLists, place: int, vectors: Tensor, lists: Tensor) -> None:
        self.__dict__.setdefault("assigned", {}).update(enumerate(lists.tolist(), start=place))
        write(self, place, vectors, lists)

    monkeypatch.setattr(InvertedLists, "write", write_and_record)
    bank = filled(segments=segments)
    size = CAPACITY // segments
    for vectors, ids in batches(Clusters(seed=1), 100):
        bank.push(vectors, ids)
        assert bank._lists is not None
        parts = list(bank._lists._current())
        assert sum(len(part) - first for _, part, first in parts) == CAPACITY
    for number, part, first in parts:
        rebuilt = InvertedLists(part.centroids, part._scale)
        entries = bank._entries[number * size : number * size + len(part)]
        rebuilt.write(0, entries, torch.tensor([part.__dict__["assigned"][place] for place in range(len(part))]))
        assert contents(part, first) == contents(rebuilt, first)
        assert contents(part, first).keys() == set(range(first, len(part)))


def memory_of_lists(bank: IvfBank) -> int:
    """Bytes that FAISS has allocated for codes and ids."""
    usable = getattr(ctypes.CDLL(None), "malloc_usable_size", None)
    if usable is None:
        pytest.skip("needs glibc")
    usable.restype, usable.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    assert bank._lists is not None
    every = [faiss.downcast_InvertedLists(part._index.invlists) for _, part, _ in bank._lists._current()]
    return sum(
        usable(int(pointer))
        for lists in every
        for number in range(lists.nlist)
        for pointer in (lists.get_codes(number), lists.get_ids(number))
        if pointer is not None
    )


@pytest.mark.parametrize(("segments", "most"), [(1, 3.0), (4, 2.0)])
def test_memory_of_lists_is_bounded(segments: int, most: float) -> None:
    """FAISS doubles the capacity of a full list and never shrinks it; lists of 23 entries vary by half.

    The lists of a segment start empty in each rotation, while those that they replace are still in use.
    """
    bank = IvfBank(SPEC, segments=segments)
    memory: dict[int, float] = {}
    for rotation, vectors in drift(Clusters(), rotations=6):
        bank.push(vectors, torch.arange(BATCH))
        if bank._lists is not None:
            memory[rotation] = memory_of_lists(bank) / (CAPACITY * (DIM + 8))
    assert min(memory.values()) >= 1
    assert max(memory.values()) <= most
