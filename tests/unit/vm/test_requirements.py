"""What a job may ask of virtual machines."""

from __future__ import annotations

import pytest

from blixard.domain.payload import Runtime
from blixard.domain.requirements import (
    Isolation,
    JobRequirements,
    VmMode,
    WorkerType,
    check_requirements,
    worker_type_for,
)
from blixard.errors import InvalidRequest


@pytest.mark.parametrize("runtime", Runtime)
def test_maximum_and_service_machines_need_a_microvm_worker(runtime: Runtime) -> None:
    assert worker_type_for(runtime, Isolation.MAXIMUM) is WorkerType.MICROVM
    assert worker_type_for(runtime, Isolation.STANDARD, VmMode.SERVICE) is WorkerType.MICROVM
    assert worker_type_for(runtime, Isolation.STANDARD) is not WorkerType.MICROVM


@pytest.mark.parametrize(
    "good",
    [
        JobRequirements(isolation=Isolation.MAXIMUM),
        JobRequirements(isolation=Isolation.MAXIMUM, vm_mode=VmMode.EPHEMERAL, image="data-science"),
        JobRequirements(vm_mode=VmMode.SERVICE, image="f" * 64),
    ],
)
def test_what_a_machine_can_be_asked_for(good: JobRequirements) -> None:
    check_requirements(good, Runtime.PYTHON)


@pytest.mark.parametrize(
    ("wrong", "field", "words"),
    [
        (JobRequirements(isolation=Isolation.MAXIMUM, vm_mode=VmMode.SERVICE), "vm_mode", "isolation standard"),
        (JobRequirements(isolation=Isolation.MINIMAL, vm_mode=VmMode.SERVICE), "vm_mode", "isolation standard"),
        (JobRequirements(vm_mode=VmMode.EPHEMERAL), "vm_mode", "isolation maximum"),
        (JobRequirements(image="plain"), "image", "asks for none"),
        (JobRequirements(isolation=Isolation.MAXIMUM, image="../etc"), "image", "cannot be the name"),
        (JobRequirements(isolation=Isolation.MAXIMUM, image="x" * 129), "image", "cannot be the name"),
        (
            JobRequirements(vm_mode=VmMode.SERVICE, worker_types=(WorkerType.PROCESS,)),
            "worker_types",
            "microvm",
        ),
    ],
)
def test_what_it_cannot_be_asked_for(wrong: JobRequirements, field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        check_requirements(wrong, Runtime.PYTHON)
    assert caught.value.field == f"requirements.{field}"
