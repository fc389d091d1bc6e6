"""Pickles made to harm, by hand and by the hundred: every one is refused in words, and none runs.

Each would make a folder if it ran. Names that reach other code are written with every opcode that can call them, bare
and inside the container of torch; then streams that no pickler would write. Goal W1 of the reliability goals.
"""

import io
import itertools
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from hilum.backbones.pickled import read_pickled
from hilum.core.errors import CheckpointError

NAMES = """
os system|os popen|os execv|os remove|os mkdir|os putenv|os fork|posix system|posix mkdir|nt system|subprocess Popen
subprocess run|subprocess check_output|subprocess getoutput|builtins eval|builtins exec|builtins compile|builtins open
builtins __import__|builtins getattr|builtins setattr|builtins globals|builtins vars|builtins input|__builtin__ eval
__builtin__ file|importlib import_module|importlib.util spec_from_file_location|runpy run_path|runpy run_module
pty spawn|platform popen|socket create_connection|socket socket|ssl create_default_context|urllib.request urlopen
urllib.request urlretrieve|http.client HTTPConnection|ftplib FTP|smtplib SMTP|webbrowser open|shutil rmtree|shutil move
shutil copyfile|tempfile mkdtemp|pathlib Path|io open|_io FileIO|codecs open|fileinput input|zipfile ZipFile|tarfile open
pickle loads|pickle load|_pickle loads|marshal loads|shelve open|dill loads|joblib load|cloudpickle loads|yaml load
types FunctionType|types CodeType|code InteractiveInterpreter|codeop compile_command|ctypes CDLL|ctypes.util find_library
cffi FFI|functools partial|functools reduce|operator attrgetter|operator methodcaller|itertools starmap|timeit timeit
timeit Timer|cProfile run|profile run|pdb run|pdb set_trace|bdb Bdb|trace Trace|doctest testfile|unittest main
logging.config fileConfig|multiprocessing.util spawnv_passfds|multiprocessing Process|concurrent.futures ThreadPoolExecutor
threading Thread|_thread start_new_thread|signal signal|atexit register|gc get_objects|inspect stack|site addsitedir
ensurepip bootstrap|pip main|venv create|sys exit|sys setrecursionlimit|resource setrlimit|sqlite3 connect
torch load|torch.serialization load|torch.hub load|torch.hub load_state_dict_from_url|torch.jit load|torch.jit.unsupported_tensor_ops execWrapper
torch.storage _load_from_bytes|torch.utils.cpp_extension load|torch.utils.cpp_extension load_inline|torch.ops load_library
torch.classes load_library|torch._utils _import_dotted_name|torch.package PackageImporter|torch.nn Module|torch.fx Interpreter
torch._inductor.codecache PyCodeCache|torch.distributed.rpc rpc_sync|torch.multiprocessing spawn|torch.utils.model_zoo load_url
numpy load|numpy fromfile|numpy.testing runstring|numpy.core.multiarray _reconstruct|numpy.f2py compile|pandas read_pickle
sklearn.externals.joblib load|hilum.backbones.pickled read_pickled|hilum.core.files write_text|__main__ run|antigravity geohash
"""  # noqa: E501
GLOBALS = [tuple(name.split()) for line in NAMES.strip().splitlines() for name in line.split("|")]


def short(text: str) -> bytes:
    content = text.encode()
    return b"\x8c" + bytes([len(content)]) + content


def calls(module: str, name: str, argument: str) -> dict[str, bytes]:
    """A call of one name with one word, by each opcode that calls."""
    word = b"X" + struct.pack("<I", len(argument)) + argument.encode()
    asked = f"c{module}\n{name}\n".encode()
    return {
        "reduce": b"\x80\x02" + asked + word + b"\x85R.",
        "reduce_text": asked + b"(S" + repr(argument).encode() + b"\ntR.",
        "stack": b"\x80\x04" + short(module) + short(name) + b"\x93" + word + b"\x85R.",
        "inst": b"(" + word + f"i{module}\n{name}\n.".encode(),
        "obj": b"\x80\x02(" + asked + word + b"o.",
        "newobj": b"\x80\x02" + asked + word + b"\x85\x81.",
        "newobj_ex": b"\x80\x04" + short(module) + short(name) + b"\x93" + word + b"\x85}\x92.",
        "build": b"\x80\x02" + asked + b")\x81}" + word + word + b"sb.",
        "key": b"\x80\x02}" + asked + word + b"\x85RK\x01s.",
        "alone": b"\x80\x02" + asked + b".",
    }


def in_container(stream: bytes) -> bytes:
    """The stream as `data.pkl` of an archive as torch writes it."""
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(2)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, stream if entry.filename.endswith("data.pkl") else source.read(entry))
    return packed.getvalue()


def malformed() -> dict[str, bytes]:
    """What no pickler writes."""
    start = b"\x80\x02"
    return {
        "empty": b"",
        "stop": b".",
        "no_stop": start + b"K\x01",
        "underflow": start + b"R.",
        "mark_missing": start + b"t.",
        "memo_missing": start + b"h\x07.",
        "protocol": b"\x80\xff.",
        "unknown": start + b"\xff\xfe.",
        "long": start + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",
        "long_negative": start + b"\x8b" + struct.pack("<i", -1) + b".",
        "text_of_exabytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
        "bytes_of_exabytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
        "frame_of_exabytes": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"x.",
        "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"x.",
        "buffer": b"\x80\x05\x97.",
        "readonly": b"\x80\x05\x98.",
        "extension": start + b"\x82\x01.",
        "extension_4": start + b"\x84" + struct.pack("<i", 7) + b".",
        "persistent": b"Phttp://evil.example\n.",
        "persistent_binary": start + b"X\x01\0\0\0xQ.",
        "integer_text": b"I" + b"9" * 10000 + b"\n.",
        "float_text": b"Fnan(\n.",
        "string_unclosed": b"S'abc\n.",
        "unicode_escape": b"V\\ud800\n.",
        "get_text": b"g99\n.",
        "put_far": start + b"K\x01r" + struct.pack("<I", 2**31) + b"K\x01.",
        "dup": start + b"]2" + b"2" * 50 + b".",
        "deep_list": start + b"]" * 20000 + b"a" * 19999 + b".",
        "deep_tuple": start + b")" + b"\x85" * 100_000 + b".",
        "inside_itself": start + b"]q\x00h\x00a.",
        "laughs": start + b"]q\x00" + b"(" + b"h\x00" * 10 + b"lq\x00" * 1 + b".",
        "set_without_mark": b"\x80\x04\x90.",
        "appends": start + b"](e.",
        "pop": start + b"0.",
        "pop_mark": start + b"1.",
        "no_name": b"c\n\n.",
        "name_of_spaces": b"c \n \n.",
        "newline_in_name": b"\x80\x04" + short("os\n") + short("x") + b"\x93.",
        "dotted": b"\x80\x04" + short("torch") + short("serialization.load") + b"\x93.",
        "private": b"\x80\x04" + short("torch") + short("_C.__dict__") + b"\x93.",
        "rebuild_negative": start + b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(J\xff\xff\xff\xfft)\x89}tR.",
        "rebuild_nothing": start + b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        "storage": start + b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.",
        "dict_as_state": start + b"ccollections\nOrderedDict\n)R}X\x06\0\0\0__reduce__N\x85sb.",
    }


def hostile(mark: Path) -> dict[str, bytes]:
    """Every file, by name."""
    made = {}
    for (module, name), call in itertools.product(GLOBALS, calls("x", "x", "x")):
        stream = calls(module, name, str(mark))[call]
        made[f"{module}.{name} {call}"] = in_container(stream) if (len(made) % 3 == 0) else stream
    for name, stream in malformed().items():
        made[name] = stream
        made[f"{name} in a container"] = in_container(stream)
    return made


def test_there_are_more_kinds_than_the_public_collection_has() -> None:
    assert len(GLOBALS) >= 109
    assert len(set(GLOBALS)) == len(GLOBALS)
    assert len(hostile(Path("x"))) >= 1200


def test_the_calls_are_calls(tmp_path: Path) -> None:
    """Read by Python's own unpickler each makes the folder; so the tests below can fail."""
    for name, stream in calls("os", "mkdir", str(tmp_path / "mark")).items():
        if name in ("alone", "newobj", "newobj_ex", "build"):  # these make objects of classes, which mkdir is not
            continue
        pickle.loads(stream)
        (tmp_path / "mark").rmdir()
    made = pickle.loads(calls("pathlib", "PurePath", "a")["newobj"])
    assert made.__class__.__name__.startswith("PurePosix")


def refuse_all(folder: Path, step: int = 1) -> list[str]:
    """What was not refused in words, or made a mark, or took more than two seconds of the processor."""
    mark, file, wrong = folder / "it_ran", folder / "weights.pth", []
    for name, content in itertools.islice(hostile(mark).items(), 0, None, step):
        file.write_bytes(content)
        start = time.process_time()
        try:
            read_pickled(file)
            wrong.append(f"{name}: read")
        except CheckpointError as error:
            if str(mark) in str(error):
                wrong.append(f"{name}: repeated")
        except BaseException as error:
            wrong.append(f"{name}: {type(error).__name__}")
        if mark.exists():
            wrong.append(f"{name}: ran")
            mark.rmdir()
        if time.process_time() - start > 2:
            wrong.append(f"{name}: slow")
    return wrong


def test_every_ninth_is_refused(tmp_path: Path) -> None:
    assert refuse_all(tmp_path, 9) == []


@pytest.mark.slow
def test_all_are_refused_in_a_child_without_network_and_with_little_memory(tmp_path: Path) -> None:
    """As `hilum import-weights` reads them, with 4 GiB of address space at most."""
    program = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from hilum.backbones.pickled import isolate
isolate()
import test_hostile_pickles as tests
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
from pathlib import Path
wrong = tests.refuse_all(Path({str(tmp_path)!r}))
print(wrong)
sys.exit(bool(wrong))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_two_plain_kinds_are_read(tmp_path: Path) -> None:
    for legacy in (True, False):
        torch.save({"a": torch.arange(3.0)}, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
        assert read_pickled(tmp_path / "w.pth")[0]["a"].tolist() == [0, 1, 2]
