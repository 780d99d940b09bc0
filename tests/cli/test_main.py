"""The command's outer behaviour: help at once, errors in one clear line, exit statuses."""

import subprocess
import sys
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest

from nanovllm.cli.arguments import build_parser
from nanovllm.cli.main import main
from nanovllm.cli.options import engine_options, field_docs, sampling_options
from nanovllm.config import EngineConfig
from nanovllm.sampling_params import SamplingParams

COMMANDS = [[name] for name in ("complete", "chat", "demo", "bench", "check-model", "models", "memory")]
COMMANDS += [["bench", kind] for kind in ("throughput", "latency", "prefill", "prefix", "start", "ablation", "chart")]


def loaded_by(code: str) -> set[str]:
    """Top-level modules of other packages that `code` loads in a new process."""
    count = (
        "import sys; before = set(sys.modules)\n"
        f"{code}\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*(loaded - sys.stdlib_module_names - {'nanovllm'}))"
    )
    result = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_help_loads_no_other_package() -> None:
    """Help comes at once, and needs neither torch nor a device."""
    loaded = loaded_by("from nanovllm.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass")
    assert loaded <= {"nanovllm_bench"}  # the flags of its kinds


def test_importing_the_package_loads_no_other() -> None:
    """No torch, and no time."""
    assert loaded_by("import nanovllm") == set()


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_every_command_has_help_with_examples_or_notes(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*command, "--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: nanovllm")
    assert "None" not in shown, "the command line has no None"
    assert max(map(len, shown.splitlines())) <= 110


def test_without_the_benchmarks_the_command_says_where_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are a package of their own, which a wheel does not bring."""
    monkeypatch.setattr("nanovllm.cli.bench.find_spec", lambda name: None)
    assert main(["bench", "throughput", "--num-prompts", "4"]) == 2
    assert "pip install -e" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "--help"])
    assert exit_info.value.code == 0
    assert "come with the source" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("nanovllm 0.")


@pytest.mark.parametrize("owner", [EngineConfig, SamplingParams])
def test_every_field_is_documented(owner: type) -> None:
    docs = field_docs(owner)
    assert list(docs) == [field.name for field in fields(owner)]
    for name, text in docs.items():
        assert text, f"{owner.__name__}'s docstring has no line for {name}"


def test_flags_become_fields() -> None:
    """What is typed reaches the dataclass under its own name, and what is not typed is left to it."""
    args = build_parser().parse_args(
        "complete hi --max-num-seqs 7 --no-enable-prefix-caching --enforce-eager --dtype float32 --seed 3 "
        "--gpu-memory-utilization 0.5 --temperature 0 --stop a --stop b --stop-token-ids 5 --ignore-eos".split()
    )
    assert engine_options(args) == {
        "max_num_seqs": 7,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "dtype": "float32",
        "seed": 3,
        "gpu_memory_utilization": 0.5,
    }
    assert sampling_options(args) == {"temperature": 0.0, "stop": ["a", "b"], "stop_token_ids": [5], "ignore_eos": True}
    EngineConfig(model="x", **engine_options(args))
    SamplingParams(**sampling_options(args))
    guesses = ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}']
    given = engine_options(build_parser().parse_args(["complete", *guesses]))
    assert given == {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
    with pytest.raises(SystemExit):
        build_parser().parse_args(["complete", "--speculative-config", "ngram"])
    args = build_parser().parse_args(["complete"])
    assert engine_options(args) == sampling_options(args) == {}


def test_every_engine_option_has_a_flag() -> None:
    shown = {command: _help_of(command) for command in ("complete", "chat")}
    for field in fields(EngineConfig):
        if field.name not in ("model", "skip_tokenizer_init", "logits_processors", "use_tqdm_on_load"):
            flag = "--" + field.name.replace("_", "-")
            assert all(flag in text for text in shown.values()), flag


def _help_of(command: str) -> str:
    subcommands = build_parser()._subparsers
    assert subcommands is not None
    choices = subcommands._group_actions[0].choices
    assert isinstance(choices, dict)
    return choices[command].format_help()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["complete", "hi", "--model", "/nonexistent/folder"], "does not exist"),
        (["complete", "hi", "--model", "demo", "--block-size", "7"], "block_size must be one of"),
        (["complete", "hi", "--max-num-seqs", "0"], "max_num_seqs must be at least 1"),
        (["complete", "hi", "--file", "prompts.txt"], "not both"),
        (["complete", "--file", "/nonexistent/prompts.txt"], "/nonexistent/prompts.txt"),
        (["memory", "/nonexistent/folder"], "does not exist"),
        (["memory", "demo", "--max-num-seqs", "0"], "--max-num-seqs must be at least 1"),
        (["check-model", "demo", "--tolerance", "0"], "--tolerance must be more than 0"),
        (["bench", "throughput", "--num-prompts", "0"], "number of prompts must be at least 1"),
        (["bench", "throughput", "--repeats", "0"], "--repeat must be at least 1"),
        (["bench", "throughput", "--workload", "onlin"], "there is no workload 'onlin'"),
        (["bench", "prefix", "--prefix-len", "0"], "prefix-len must be at least 1"),
        (["bench", "latency", "--arrivals", "--num-streams", "0"], "--num-streams, --arrival-len"),
        (["bench", "throughput", "--workload", "offline", "--mixed"], "has lengths of its own"),
        (["bench", "latency", "--output-len", "1"], "--output-len must be at least 2"),
    ],
)
def test_a_mistake_is_one_clear_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"nanovllm {argv[0]}: error: ")
    assert "[Errno" not in captured.err
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="does not exist"):
        main(["--debug", "memory", "/nonexistent/folder"])


def test_a_misspelt_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With the right one, and the usage of the command it was typed for."""
    for argv, usage, right in (
        (["complete", "hi", "--temprature", "0"], "nanovllm complete", "--temperature"),
        (["bench", "latency", "--ouput-len=3"], "nanovllm bench latency", "--output-len"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(argv)
        assert exit_info.value.code == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"usage: {usage} ")
        assert f"did you mean {right}?" in shown


def test_ctrl_c_while_the_command_is_still_being_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nanovllm.cli.arguments.parse_arguments", interrupted)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "\n"


@pytest.mark.slow
def test_the_wheel_is_small_and_holds_only_the_package(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nanovllm"}
