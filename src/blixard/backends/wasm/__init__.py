"""Runs WebAssembly jobs: WASI preview 1 commands and exported functions. See DESIGN.md."""
