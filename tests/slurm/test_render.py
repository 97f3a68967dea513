"""Job scripts as text: options of sbatch, quoting, containers; and what a site's YAML may hold."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from launcher.main import app
from launcher.slurm.cluster_config import ClusterConfig, Container, load_cluster
from launcher.slurm.command_jobs import CommandJob
from launcher.slurm.render import (
    SlurmRequest,
    TemplateError,
    build_request,
    directives,
    in_container,
    limit_seconds,
    program,
    quote_with_variables,
    render,
    template_folder,
)
from launcher.slurm.submit import PretrainJob, job_log
from medvlp.config_files import ConfigError
from shards.errors import UsageError
from tests.training.runs import TINY

CLUSTERS = Path(__file__).resolve().parents[2] / "configs" / "clusters"


def bash(script: str, **environment: str) -> str:
    given = {"PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(
        ["bash", "-c", script], check=True, capture_output=True, text=True, env=given
    ).stdout


@settings(max_examples=25)
@given(st.text(st.characters(blacklist_characters="\x00\r", blacklist_categories=["Cs"]), max_size=30))
def test_only_names_of_variables_live_in_a_quoted_value(text: str) -> None:
    plain = text.replace("$", "")
    assert bash(f"printf %s {quote_with_variables(plain)}") == plain
    with_name = f"{plain}/${{NAME}}$NAME/$(false)`false`"
    expected = f"{plain}/a ba b/$(false)`false`"
    assert bash(f"printf %s {quote_with_variables(with_name)}", NAME="a b") == expected


def test_options_become_directives() -> None:
    request = SlurmRequest(
        "my run; rm -rf ~", Path("/runs/a b/slurm/job-%j.out"), nodes=2, gpus_per_node=4, gpu_type="a100",
        time="1-02:00:00", signal_seconds=90, exclusive=True, dependency="afterok:12", constraint="a100&ib",
        exclude="gpu[01-03,7]", extra=["--nice=100", "--hold"],
    )  # fmt: skip
    lines = directives(request)
    assert "#SBATCH --job-name=my_run__rm_-rf__" in lines
    assert "#SBATCH --gpus-per-node=a100:4" in lines
    assert "#SBATCH --signal=B:USR1@90" in lines
    assert '#SBATCH --output="/runs/a b/slurm/job-%j.out"' in lines
    assert lines[-2:] == ["#SBATCH --nice=100", "#SBATCH --hold"]
    assert not any("--mem" in line or "None" in line for line in lines)


@pytest.mark.parametrize(
    "wrong",
    [
        {"partition": "a b"},
        {"partition": "a\n#SBATCH --uid=0"},
        {"account": "$(id)"},
        {"time": "soon"},
        {"extra": ["--comment=a b"]},
        {"output": Path('/a"b/job.out')},
        {"dependency": ""},
    ],
)
def test_values_that_could_be_something_else_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        directives(replace(SlurmRequest("a", Path("/out")), **wrong))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("UNLIMITED", None),
        ("0", None),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(time: str, seconds: int | None) -> None:
    assert limit_seconds(time) == seconds


@pytest.mark.parametrize(
    "time",
    [
        "1:99:99",
        "0:60",
        "1-24",
        "1-0:60",
        "9" * 30,
        "-1",
        "1e3",
        "",
        "1:2:3:4",
        "\u0661",
        "1h",
        "99999-0",
        "10\n",
    ],
)
def test_a_time_that_sbatch_would_read_otherwise_is_refused(time: str) -> None:
    with pytest.raises(UsageError, match="--time"):
        directives(SlurmRequest("a job", Path("/tmp/log"), nodes=1, time=time))


@pytest.mark.parametrize(
    "memory", ["500Q", "lots", "-1", "1.5G", "", "500GB", "9" * 20, "9999T", "nan", "5 G"]
)
def test_memory_that_no_node_has_is_refused(memory: str) -> None:
    with pytest.raises(UsageError, match="--mem"):
        directives(SlurmRequest("a job", Path("/tmp/log"), nodes=1, mem=memory))


@pytest.mark.parametrize("memory", ["0", "500", "500G", "2T", "64000M", None])
def test_memory_as_sbatch_takes_it(memory: str | None) -> None:
    lines = directives(SlurmRequest("a job", Path("/tmp/log"), nodes=1, mem=memory))
    assert (f"#SBATCH --mem={memory}" in lines) == (memory is not None)


def test_the_warning_fits_into_the_time() -> None:
    site = ClusterConfig()
    for time, given_seconds, expected in [
        ("60", None, 300),
        ("5", None, 100),
        ("5", 200, 200),
        (None, None, 300),
    ]:
        request = build_request(
            site, Path("/out"), "a", 1, {"time": time, "signal_seconds": given_seconds, "qos": None}
        )
        assert request.signal_seconds == expected
    with pytest.raises(UsageError, match="does not fit"):
        build_request(site, Path("/out"), "a", 1, {"time": "1", "signal_seconds": 60})


def test_the_command_line_stands_above_the_site_and_extra_options_add_up() -> None:
    site = load_cluster(CLUSTERS / "preemptible.yaml")
    request = build_request(
        site, Path("/out"), "a", 2, {"partition": "other", "gpus_per_node": None, "extra": ["-H"]}
    )
    assert (request.partition, request.gpus_per_node, request.time) == ("other", 4, "4:00:00")
    assert request.extra == ["--nice=100", "-H"]


def hostile_job(site: ClusterConfig) -> PretrainJob:
    run_dir = Path('/runs/it\'s $(touch gone) `x`; "y"')
    return PretrainJob(
        SlurmRequest("a", Path("/out")), site, run_dir, "a: 1", ranks_per_node=2, max_requeues=3
    )


@pytest.mark.parametrize("kind", ["none", "apptainer", "pyxis"])
def test_a_script_holds_names_as_they_are(kind: Literal["none", "apptainer", "pyxis"]) -> None:
    site = ClusterConfig(
        container=Container(kind, None if kind == "none" else "my image.sif", ["/a b:/c"]),
        environment={"NAME": "it's $HOME; $(no)"},
        modules=["cuda/12"],
    )
    job = hostile_job(site)
    script = job.script()
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    (assignment,) = [line for line in script.splitlines() if line.startswith("run_dir=")]
    assert bash(f'{assignment}; printf %s "$run_dir"') == str(job.run_dir)
    (export,) = [line for line in script.splitlines() if line.startswith("export NAME=")]
    assert bash(f'{export}; printf %s "$NAME"', HOME="/home/me") == "it's /home/me; $(no)"
    step = script.partition("--ntasks-per-node=1 ")[2].partition(" &\n")[0].replace("\\\n", " ")
    words = shlex.split(step)
    assert str(job.config_file) in words
    assert words[-2:] == ["--nproc", "2"]
    if kind == "apptainer":
        assert words[words.index("apptainer") :][:5] == [
            "apptainer",
            "exec",
            "--bind",
            "/a b:/c",
            "my image.sif",
        ]
    if kind == "pyxis":
        assert "--container-image=my image.sif" in words
        assert "--container-mounts=/a b:/c" in words


def test_how_a_job_calls_the_program() -> None:
    assert program(ClusterConfig())[1:] == ["-m", "launcher.main"]
    assert program(ClusterConfig(container=Container("apptainer", "x.sif"))) == ["medvlp"]
    assert program(ClusterConfig(command=["/opt/medvlp"])) == ["/opt/medvlp"]
    assert (
        in_container(ClusterConfig(container=Container("apptainer", "x.sif")), has_gpus=True)[1][2] == "--nv"
    )


@pytest.mark.parametrize("name", ["cpu", "8xh100", "preemptible"])
def test_the_examples_render(name: str, tmp_path: Path) -> None:
    command = [
        "submit", *TINY, "data.root=/data", f"run.dir={tmp_path / 'run'}", "train.global_batch=64",
        "--nodes", "2", "--cluster", str(CLUSTERS / f"{name}.yaml"), "--dry-run",
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.exception
    assert subprocess.run(["bash", "-n"], input=result.output, text=True).returncode == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sbatch: {partiton: a}", r"unknown key 'sbatch\.partiton'.*did you mean 'sbatch\.partition'"),
        ("sbatch: {max_requeues: many}", r"sbatch\.max_requeues"),
        ("sbatch: {signal_seconds: 1}", "out of range"),
        ("container: {kind: docker}", r"container\.kind"),
        ("container: {kind: pyxis}", "needs container.image"),
        ("container: {image: x.sif}", "choose container.kind"),
        ("container: {kind: pyxis, image: x, mounts: [/data]}", "is not source:target"),
        ("environment: {MY-NAME: x}", "is no name of a variable"),
        ("srun: [overlap]", "is no option"),
        ("sbatch: {extra: [--clusters=gpu]}", "--clusters=gpu: jobs of another cluster"),
        ("sbatch: {extra: [--cluster gpu]}", "--cluster gpu: jobs of another cluster"),
        ("sbatch: {extra: [-Mgpu]}", "-Mgpu: jobs of another cluster"),
        ("- a", "not a list"),
    ],
)
def test_a_wrong_site_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises((ConfigError, UsageError), match=rf"site\.yaml.*{message}|{message}"):
        load_cluster(file)


def test_a_template_without_a_value_is_an_error() -> None:
    with pytest.raises(TemplateError, match=r"slurm/pretrain\.sbatch\.j2: .* is undefined"):
        render("pretrain.sbatch.j2", directives=[])
    with pytest.raises(TemplateError, match="nothing"):
        render("nothing.sbatch.j2")
    assert (template_folder() / "pretrain.sbatch.j2").is_file()


@pytest.mark.parametrize("is_array", [False, True])
def test_a_folder_that_sbatch_would_read_as_a_pattern_is_refused(is_array: bool) -> None:
    with pytest.raises(UsageError, match="pattern"):
        job_log(Path("/runs/100%j"), is_array)


def scripts(site: ClusterConfig, **asked: Any) -> list[str]:
    """Of a training and of a command, which ask for the same."""
    request = SlurmRequest("a", Path("/out"), **asked)
    return [
        PretrainJob(request, site, Path("/run"), "a: 1", ranks_per_node=1, max_requeues=3).script(),
        CommandJob("evaluate", Path("/run"), request, site, [["evaluate", "/run"]]).script(),
    ]


@pytest.mark.parametrize(
    ("runs", "job"), [(1, "$SLURM_JOB_ID"), (2, "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID")]
)
def test_a_warned_task_of_an_array_requeues_itself_alone(runs: int, job: str) -> None:
    """SLURM_JOB_ID of an array's last task is the array's, and means all of it to scontrol."""
    commands = [["evaluate", "/run"]] * runs
    request = SlurmRequest("a", Path("/out"))
    finished = [["/run"]] * runs
    script = CommandJob(
        "evaluate", Path("/run"), request, ClusterConfig(), commands, finished=finished
    ).script()
    assert re.findall(r"^job=(.*)$", script, re.MULTILINE) == [job]
    assert re.findall(r"scontrol requeue (\S+) ", script) == ['"$job"']


def test_a_job_computes_on_what_it_asked_for() -> None:
    """DS_ACCELERATOR=cpu of a login shell kept the ranks of a job from its GPUs."""
    for script in scripts(ClusterConfig()):
        assert "\nexport DS_ACCELERATOR=cpu\n" in script
    for script in scripts(ClusterConfig(), gpus_per_node=1):
        assert "\nunset DS_ACCELERATOR" in script
    for script in scripts(ClusterConfig(environment={"DS_ACCELERATOR": "cuda"}), gpus_per_node=1):
        assert "\nexport DS_ACCELERATOR=cuda\n" in script
        assert "unset" not in script


def test_a_task_is_bound_only_to_cpus_that_it_asked_for() -> None:
    """Else one on a whole node is bound to a single core."""
    for script in scripts(ClusterConfig(), exclusive=True):
        assert "--cpu-bind=none" in script
        assert "--cpu-bind=cores" not in script
    for script in scripts(ClusterConfig(), cpus_per_task=4):
        assert "--cpus-per-task=4 --cpu-bind=cores" in script
