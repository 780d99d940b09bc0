"""What each operation means, and for each device how it is computed.

The files of this folder are for every reader: contracts, PyTorch references and the types that pass between them. Twins
that compute the same are in `triton/` (GPUs) and `cpu/` (C++), loaded when a tensor or an engine asks for them. In
`triton/`, a file is named like its operation; `attention/`, `linear/` and `batch_invariant/` hold those that take more
than one file, and `common/` what all launches need.
"""
