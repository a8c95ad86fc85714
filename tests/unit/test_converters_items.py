"""Items of a torch_dist file are what torch saves and reads."""

import io
import zipfile
from pathlib import Path

import pytest
import torch

from megaswift.converters.dcp_items import empty_object, find_data, wrap

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (1, 2, 3, 4), (0, 3)])
def test_items_are_what_torch_saves(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape).to(DTYPES[dtype])
    raw = expected.reshape(-1).view(torch.uint8).numpy().tobytes()
    wrapping = wrap(dtype, shape)
    ours = wrapping.before + raw + wrapping.after
    found = torch.load(io.BytesIO(ours), weights_only=True)
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    theirs = io.BytesIO()
    torch.save(expected, theirs)
    for item in (ours, theirs.getvalue()):
        (tmp_path / "file").write_bytes(b"before" + item + b"after")
        begin = find_data(tmp_path / "file", offset=6, length=len(item), num_bytes=len(raw))
        assert (tmp_path / "file").read_bytes()[begin : begin + len(raw)] == raw


def test_empty_object_is_a_list_of_none() -> None:
    assert torch.load(io.BytesIO(empty_object()), weights_only=True) == [None]


def test_items_beyond_four_gigabytes_are_zip64(tmp_path: Path) -> None:
    shape = (70_000, 32_768)
    wrapping, num_bytes = wrap("BF16", shape), 2 * 70_000 * 32_768
    with (tmp_path / "huge").open("wb") as file:  # a hole on the disk
        file.write(wrapping.before)
        file.seek(len(wrapping.before) + num_bytes - 2)
        file.write(b"\x80\x3f" + wrapping.after)
    assert zipfile.ZipFile(tmp_path / "huge").infolist()[-1].file_size == num_bytes
    assert torch.load(tmp_path / "huge", weights_only=True, mmap=True)[-1, -1] == 1
    length = (tmp_path / "huge").stat().st_size
    assert find_data(tmp_path / "huge", offset=0, length=length, num_bytes=num_bytes) == len(wrapping.before)
