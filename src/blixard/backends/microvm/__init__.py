"""Runs jobs in virtual machines. See DESIGN.md."""

from blixard.backends.microvm.backend import MicroVmBackend

__all__ = ["MicroVmBackend"]
