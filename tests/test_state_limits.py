"""Reading a state file takes time and memory in proportion to it, whatever it says."""

import struct
import tracemalloc

import numpy as np
import pytest
import state_bytes as sb

import gguf_io
from gguf_io import state_parser
from tbq import FileFormatError


@pytest.fixture
def state_file(tmp_path):
    def write(data):
        path = tmp_path / "state.bin"
        path.write_bytes(data)
        return path

    return write


def hybrid_of_empty_records(records, n_layer):
    """A KV memory and a recurrent memory of `records` records without bytes."""
    memory = sb.kv(1, ((1, 2),)) + sb.cells(1) + sb.u32(0, n_layer)
    return sb.sequence(memory + sb.rows(0, 0, 1) * records)


def count_records(monkeypatch):
    read, plain = [], state_parser._rows

    def counting(cursor, kind, cells, least_bytes=1):
        read.append(kind)
        return plain(cursor, kind, cells, least_bytes)

    monkeypatch.setattr(state_parser, "_rows", counting)
    return read


def test_every_record_is_read_a_bounded_number_of_times(monkeypatch, state_file):
    path = state_file(hybrid_of_empty_records(2047, 1024))  # odd: no number of layers fits
    read = count_records(monkeypatch)
    with pytest.raises(FileFormatError, match="no memory layout fits"):
        gguf_io.open_state(path)
    assert 2047 <= len(read) < 33 * 2047


@pytest.mark.parametrize(("records", "layers"), [(2, 1), (8, 4), (2048, 1024)])
def test_the_number_of_recurrent_layers_follows_from_the_records(state_file, records, layers):
    with gguf_io.open_state(state_file(hybrid_of_empty_records(records, 1024))) as s:
        assert s.layout.recurrent_layers == layers
        assert [r.kind for r in s.memories[1].r] == ["R"] * layers
        assert [r.kind for r in s.memories[1].s] == ["S"] * layers
        assert len(s.tensors) == 2 + 2 * layers


def test_more_records_than_layers_are_refused(state_file):
    with pytest.raises(FileFormatError, match="no memory layout fits"):
        gguf_io.open_state(state_file(hybrid_of_empty_records(8, 3)))


def varied(count, mrope):
    """Cells of one, two or three sequences, too many to be looked at in one piece."""
    return [tuple(range(1 + i * i % 3)) for i in range(count)]


@pytest.mark.parametrize("mrope", [False, True])
def test_cells_that_differ(state_file, tmp_path, mrope):
    count = 2 * state_parser.CHUNK_CELLS + 77
    sequences = varied(count, mrope)
    data = sb.sequence(sb.kv(count, ((1, 2),), mrope=mrope, sequences=sequences))
    path = state_file(data)
    with gguf_io.open_state(path, mrope=mrope) as s:
        (cells,) = s.cells(0)
        assert np.array_equal(cells.positions, np.arange(count))
        assert cells.sequence_counts.tolist() == [len(ids) for ids in sequences]
        assert cells.sequences.tolist() == [i for ids in sequences for i in ids]
        if mrope:
            assert (cells.coordinates == [3, 4]).all()
        else:
            assert cells.coordinates is None
        gguf_io.write_state(tmp_path / "copy", s)
    assert (tmp_path / "copy").read_bytes() == data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((0, -2), "position is -2, not from -1 to"),
        ((1, 257), "sequence count of a cell is 257, not from 1 to 256"),
        ((1, 0), "sequence count of a cell is 0"),
        ((2, 256), "sequence id is 256, not from 0 to 255"),
        ((2, -1), "sequence id is -1"),
    ],
)
def test_bad_cells_are_found_where_they_are(state_file, change, words):
    count = state_parser.CHUNK_CELLS + 10
    sequences = varied(count, False)
    data = bytearray(sb.sequence(sb.kv(count, ((1, 2),), sequences=sequences)))
    bad = count - 3
    at = 24 + 4 + 4 + sum(8 + 4 * len(ids) for ids in sequences[:bad]) + 4 * change[0]
    data[at : at + 4] = struct.pack("<i", change[1])
    with pytest.raises(FileFormatError, match=words) as caught:
        gguf_io.open_state(state_file(bytes(data)), mrope=False)
    assert caught.value.offset == at


def test_cells_that_differ_take_less_memory_than_the_file(state_file, tmp_path):
    count = 60_000
    data = sb.sequence(sb.kv(count, ((100, 1),), sequences=varied(count, False)))
    path = state_file(data)
    tracemalloc.start()
    try:
        with gguf_io.open_state(path) as s:
            opened = tracemalloc.get_traced_memory()[1]
            gguf_io.write_state(tmp_path / "copy", s)
            written = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert opened < len(data) / 2 + 500_000
    assert written < len(data) + 500_000
