"""Who started this process and where it stands among the others; what would hang is refused with the way out."""

from __future__ import annotations

import socket
import threading

import pytest

from lit_gpt.errors import EXIT_DATA, DataError
from pretrain import world as world_module
from pretrain.world import ALONE, World, connected, device_index, find_world, in_turn, is_started_again

BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",  # SLURM sets it in the batch script, too
    "SLURM_TASKS_PER_NODE": "2(x2)",
}


def step(rank: int, tasks: str, size: int, **more: str) -> dict[str, str]:
    """What SLURM 22.05 was seen to leave in the environment of a task."""
    return {
        **BATCH,
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 2),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        **more,
    }


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ALONE),
        ({"WORLD_SIZE": "1"}, ALONE),
        (TORCHRUN, World(3, 4, 1, 2, "torchrun", attempt=2)),
        (BATCH | TORCHRUN, World(3, 4, 1, 2, "torchrun", attempt=2)),  # torchrun in a batch script
        (step(3, "2", 4) | TORCHRUN, World(3, 4, 1, 2, "torchrun", attempt=2)),  # srun torchrun
        (step(1, "2", 2), World(1, 2, 1, 2, "srun")),
        (step(3, "2(x2)", 4), World(3, 4, 1, 2, "srun")),
        (step(3, "2(x2)", 4, SLURM_JOB_NAME="bash"), World(3, 4, 1, 2, "srun")),
        (step(3, "2(x2)", 4, SLURM_JOB_NAME="interactive"), World(3, 4, 1, 2, "srun")),
        (step(0, "1", 1), World(0, 1, 0, 1, "srun")),  # one task of a larger allocation
        (step(1, "2", 2, SLURM_RESTART_COUNT="3"), World(1, 2, 1, 2, "srun", attempt=3)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, World(1, 2, 1, 2, "environment")),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, ALONE),  # a batch script of one task
    ],
)
def test_a_process_knows_its_place(env, expected):
    assert find_world(env) == expected


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, False),
        (TORCHRUN, True),
        (TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "0"}, False),
        (BATCH | TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "1"}, True),
        (step(1, "2", 2), False),
        (step(1, "2", 2, SLURM_RESTART_COUNT="3"), True),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_RESTART_COUNT": "1"}, True),  # no step: python alone
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_RESTART_COUNT": "0"}, False),
    ],
)
def test_a_command_that_a_launcher_repeats_is_told_from_one_that_a_user_repeats(env, expected):
    assert is_started_again(find_world(env), env) is expected


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (BATCH, "2 node.* 4 SLURM task.*outside a step.*srun python -m pretrain"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, "2 SLURM task.*srun python -m pretrain"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, "2 node.*srun python -m pretrain"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 without RANK.*torchrun or srun"),
        (step(2, "2,1", 3), r"3 tasks, and not equally many on every node \(2,1\).*--ntasks-per-node"),
        (step(2, "2,1(x2)", 4), r"4 tasks, and not equally many on every node \(2,1\(x2\)\)"),
        ({**TORCHRUN, "RANK": "first"}, "RANK='first' must be a number"),
    ],
)
def test_a_start_that_would_hang_or_train_twice_is_refused(env, message):
    with pytest.raises(ValueError, match=message):
        find_world(env)


def test_each_process_of_a_node_has_the_device_of_its_number():
    assert [device_index(World(r, 4, r % 2, 2, "srun"), visible=2, env={}) for r in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("binding", [{"SLURM_GPUS_PER_TASK": "1"}, {"SLURM_TRES_PER_TASK": "cpu:4,gres/gpu:1"}])
def test_a_task_that_is_shown_one_device_has_that_one(binding):
    assert device_index(World(1, 2, 1, 2, "srun"), visible=1, env=binding) == 0


@pytest.mark.parametrize(("visible", "env"), [(1, {}), (0, {"SLURM_GPUS_PER_TASK": "1"}), (3, {})])
def test_more_processes_than_devices_are_refused(visible, env):
    with pytest.raises(ValueError, match=rf"4 processes on this node and {visible} CUDA device.*--ntasks-per-node"):
        device_index(World(0, 4, 0, 4, "srun"), visible, env)


def test_a_first_node_that_does_not_resolve_is_named_at_once(monkeypatch):
    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    env = step(1, "2", 2, MASTER_ADDR="node-of-nowhere", MASTER_PORT="29500")
    with (
        pytest.raises(ValueError, match="'node-of-nowhere', which does not resolve.*set MASTER_ADDR"),
        connected(find_world(env), "cpu", env),
    ):
        pytest.fail("nobody is there to meet")


def test_where_scontrol_cannot_say_the_first_node_the_message_names_the_variable(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with (
        pytest.raises(ValueError, match="scontrol cannot name the nodes.*set MASTER_ADDR"),
        connected(World(0, 2, 0, 2, "srun"), "cpu", step(0, "2", 2)),
    ):
        pytest.fail("nobody is there to meet")


def test_processes_by_hand_need_a_place_to_meet():
    env = {"RANK": "0", "WORLD_SIZE": "2"}
    with (
        pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT must be set"),
        connected(find_world(env), "cpu", env),
    ):
        pytest.fail("nobody is there to meet")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("meeting", ["file", "address"])
def test_a_process_that_the_others_leave_alone_says_so_in_time(monkeypatch, tmp_path, rank, meeting):
    monkeypatch.setattr(world_module, "MEETING_SECS", 1)
    by_address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env = by_address if meeting == "address" else {"PRETRAIN_STORE": str(tmp_path / "store")}
    with (
        pytest.raises(ValueError, match=f"process {rank} of 2 could not meet the others within 1 s.*MASTER_ADDR"),
        connected(World(rank, 2, rank, 2, "environment"), "cpu", env),
    ):
        pytest.fail("nobody is there to meet")


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_work_that_fails_on_one_process_ends_all_of_them_and_it_alone_says_why(bad_rank):
    """The processes are threads here, whose gathering is a barrier."""
    arrived, slots, ended = threading.Barrier(2, timeout=60), [None, None], {}

    class Met(World):
        def gather(self, value):
            slots[self.rank] = value
            arrived.wait()
            values = list(slots)
            arrived.wait()
            return values

    def go(rank):
        def work():
            if rank == bad_rank:
                raise DataError("damaged")

        try:
            in_turn(Met(rank, 2), work)
        except (DataError, SystemExit) as error:
            ended[rank] = error

    threads = [threading.Thread(target=go, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert str(ended[bad_rank]) == "damaged"
    assert isinstance(ended[1 - bad_rank], SystemExit) and ended[1 - bad_rank].code == EXIT_DATA
