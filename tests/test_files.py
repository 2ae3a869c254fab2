"""Files: whole or not at all after an error or a kill, JSON lines as people save them."""

import ctypes
import gzip
import json
import os
import subprocess
import sys

import pytest

from clipid_utils import files
from clipid_utils.files import (
    file_identity,
    input_files,
    json_lines,
    need,
    read_json,
    whole_file,
    whole_folder,
    write_json,
    write_json_lines,
)

# Writing

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as file:
        file.write(b"old")
        assert not path.exists()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole_file(path) as file:
            file.write(b"half")
            raise error
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["a.txt"]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    for content in ("old", "new"):
        with whole_folder(tmp_path / "a") as folder:
            assert not os.listdir(folder)
            (folder / content).touch()
    assert os.listdir(tmp_path / "a") == ["new"]
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "a") as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "a") == ["new"] and os.listdir(tmp_path) == ["a"]


def test_stopped_between_the_two_renames_the_older_folder_comes_back(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    replace, calls = os.replace, []

    def stops(old, new):
        calls.append(old)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(os, "replace", stops)
    (tmp_path / "a" / "old").touch()
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path / "a") == ["old"] and os.listdir(tmp_path) == ["a"]


def test_a_kill_leaves_the_older_files_and_does_no_harm(tmp_path):
    program = f"""
import os, runpy, signal
files = runpy.run_path("{files.__file__}")  # without the package, which takes long to import
with files["whole_file"]("a.jsonl") as file, files["whole_folder"]("b") as folder:
    file.write(b"half")
    (folder / "half").touch()
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "a.jsonl").write_text("old")
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, timeout=120).returncode == -9
    left = set(os.listdir(tmp_path)) - {"a.jsonl"}
    assert len(left) == 2 and all(name.endswith(".partial") for name in left)
    assert input_files(tmp_path) == input_files(tmp_path / "a*") == [tmp_path / "a.jsonl"]
    assert (tmp_path / "a.jsonl").read_text() == "old"
    with whole_file(tmp_path / "a.jsonl") as file:
        file.write(b"new")
    assert (tmp_path / "a.jsonl").read_text() == "new"


def test_json_is_written_as_it_is_read(tmp_path):
    value = {"kucing": ["é", 1.5, None]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value and "é".encode() in (tmp_path / "a.json").read_bytes()
    write_json_lines(tmp_path / "a.jsonl", [value, {"a": "b\nc"}])
    assert list(json_lines(tmp_path / "a.jsonl")) == [(1, value, None), (2, {"a": "b\nc"}, None)]
    with pytest.raises(UnicodeEncodeError):
        write_json_lines(tmp_path / "a.jsonl", [{}, {"a": "\ud83d"}])
    assert len(list(json_lines(tmp_path / "a.jsonl"))) == 2 and len(os.listdir(tmp_path)) == 2


# Reading

@pytest.mark.parametrize("content, message", [
    (b"\xef\xbb\xbf{\n\"a\": }", r"a\.json:2: not valid JSON"), (b'{"a": "\xe9"}', r"a\.json: byte 8 is not UTF-8"),
])
def test_bad_json_names_the_file_and_the_place(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_json_lines_as_people_save_them(tmp_path):
    lines = [b'{"a": 1}', b"", b"  ", b'{"a": "\\ud83d"}', b"3", b'{"a": "\xe9"}', b"[" * 200_000, b"{", b'{"a": 2}']
    content = b"\xef\xbb\xbf" + b"\r\n".join(lines)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("a.jsonl", "a.jsonl.gz"):
        found = list(json_lines(tmp_path / name))
        assert [(number, record) for number, record, _ in found] == [
            (1, {"a": 1}), (4, {"a": "\ud83d"}), (5, None), (6, None), (7, None), (8, None), (9, {"a": 2})]
        problems = [problem for _, _, problem in found]
        for problem, words in zip(problems[2:6], ("'3' is not a record", "byte 8 of the line is not UTF-8",
                                                  "JSON that cannot be read", "not valid JSON"), strict=True):
            assert words in problem
        assert problems[:2] == [None, None] and problems[6] is None


@pytest.mark.parametrize("cut", [slice(0, -6), slice(5, None)])
def test_gzip_that_is_cut_off_is_a_problem_of_its_line(tmp_path, cut):
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % number for number in range(50)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[cut])
    *_, (_, record, problem) = json_lines(tmp_path / "a.jsonl.gz")
    assert record is None and problem.startswith("not gzip, or cut off (") and "fetch the file again" in problem


def test_inputs_are_a_file_a_folder_or_a_glob(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["b.jsonl", "a.parquet", ".hidden.jsonl", "c.jsonl.7.partial", "d.txt", "[x].jsonl"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.jsonl").mkdir()
    assert [path.name for path in input_files("~/")] == ["[x].jsonl", "a.parquet", "b.jsonl"]
    assert input_files("~/d.txt") == [tmp_path / "d.txt"]
    assert input_files(tmp_path / "[x].jsonl") == [tmp_path / "[x].jsonl"]  # a file's name before a glob
    assert [path.name for path in input_files("~/*.*")] == ["[x].jsonl", "a.parquet", "b.jsonl", "d.txt"]
    assert input_files(tmp_path, (".txt",)) == [tmp_path / "d.txt"]
    with pytest.raises(ValueError, match=r"folder\.jsonl: no file here ends in \.jsonl or \.parquet: name a file"):
        input_files(tmp_path / "folder.jsonl")
    with pytest.raises(ValueError, match="e*.txt: no such file or folder, and no file matches it as a glob: correct"):
        input_files(tmp_path / "e*.txt")


def test_a_files_identity_changes_with_its_content(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"a" * files.HEAD + b"b")
    os.utime(path, ns=(1, 1))
    identities = [file_identity(path)]
    assert file_identity(path) == identities[0] and len(identities[0]) == 16
    for content, time in ((b"a" * files.HEAD + b"c", 2), (b"a" * files.HEAD + b"bb", 1), (b"b" * files.HEAD + b"b", 1)):
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        identities.append(file_identity(path))
    assert len(set(identities)) == 4


def test_an_absent_dependency_is_named_with_its_extra():
    assert need("json", "train") is json
    with pytest.raises(ImportError, match=r"this needs not_there, .*: pip install .*\[train\]"):
        need("not_there", "train")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="not glibc")
def test_threads_share_one_heap(tmp_path):
    code = f"""
import ctypes, sys, threading
from clipid_utils.files import use_one_arena
if sys.argv[1] == "one":
    use_one_arena()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes, libc.fopen.restype = ctypes.c_void_p, [ctypes.c_void_p], ctypes.c_void_p
libc.malloc_info.argtypes, libc.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
together = threading.Barrier(4)
def work():
    block = libc.malloc(5000)
    together.wait()
    libc.free(block)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = libc.fopen({str(tmp_path / "heaps.xml")!r}.encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
print(open({str(tmp_path / "heaps.xml")!r}).read().count("<heap nr="))
"""
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    heaps = {how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True,
                                     env=environment).stdout) for how in ("one", "usual")}
    assert heaps["one"] == 1 < heaps["usual"]
