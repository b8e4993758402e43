"""How much memory is free, by files as Linux writes them."""

from __future__ import annotations

from lit_gpt.available_memory import available_memory


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_what_is_free_is_the_less_of_machine_and_control_group(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       900 kB\nMemAvailable:       500 kB\n")
    none = tmp_path / "none"
    assert available_memory(meminfo, none) == 500 * 1024
    version_2 = write(
        tmp_path / "2",
        memory_dot_max="300000\n",
        memory_dot_current="200000\n",
        memory_dot_stat="inactive_file 50000\n",
    )
    assert available_memory(meminfo, version_2) == 150_000
    unlimited = write(tmp_path / "max", memory_dot_max="max\n", memory_dot_current="200000\n")
    assert available_memory(meminfo, unlimited) == 500 * 1024
    version_1 = write(
        tmp_path / "1", memory__memory_dot_limit_in_bytes="9000\n", memory__memory_dot_usage_in_bytes="1000\n"
    )
    assert available_memory(meminfo, version_1) == 8000
    assert available_memory(none, none) is None


def test_the_smallest_limit_counts_of_all_groups_that_the_process_is_in(tmp_path):
    own_groups = tmp_path / "own"
    own_groups.write_text("4:memory:/slurm/job_7\n1:cpu:/elsewhere\n0::/system/job_7\n")
    none = tmp_path / "none"
    version_2 = write(
        tmp_path / "2",
        system__job_7__memory_dot_max="max\n",
        system__job_7__memory_dot_current="10\n",
        system__memory_dot_max="7000\n",
        system__memory_dot_current="1000\n",
        memory_dot_max="9000\n",
        memory_dot_current="1000\n",
    )
    assert available_memory(none, version_2, own_groups) == 6000
    version_1 = write(
        tmp_path / "1",
        memory__slurm__job_7__memory_dot_limit_in_bytes="5000\n",
        memory__slurm__job_7__memory_dot_usage_in_bytes="2000\n",
        memory__memory_dot_limit_in_bytes="9223372036854771712\n",
        memory__memory_dot_usage_in_bytes="2000\n",
    )
    assert available_memory(none, version_1, own_groups) == 3000
    own_groups.write_text("0::/of/the/host\n")
    assert available_memory(none, version_2, own_groups) == 8000  # a container's own group is the outermost it sees
