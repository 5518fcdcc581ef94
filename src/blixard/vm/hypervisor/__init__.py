"""Machines: booted, saved, cloned, ended."""
