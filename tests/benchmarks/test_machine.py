"""What is recorded beside a measurement: enough to place it, nothing that names the host."""

from __future__ import annotations

import platform

from benchmarks.machine import describe


def test_a_machine_is_described_by_its_processor_and_versions():
    facts = describe()

    assert facts["cpu"] and facts["cores"] >= 1
    assert facts["python"] == platform.python_version()
    assert facts["torch"] and facts["numpy"]
    assert set(facts) == {"cpu", "cores", "flags", "memory_gib", "system", "python", "torch", "numpy", "date"}
