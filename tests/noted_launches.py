"""Launches of kernels, noted by what Triton compiles another kernel for."""

import torch


class Launches:
    """What the kernels of some `rooms`, which are modules' globals, are launched with from here on: in proofs, and
    otherwise."""

    def __init__(self, monkeypatch, rooms: list[dict]):
        self.proved: set[tuple] = set()
        self.others: set[tuple] = set()
        self.proving = False
        for room in rooms:
            for name in [name for name in room if name.endswith("_kernel") and hasattr(room[name], "arg_names")]:
                monkeypatch.setitem(room, name, Noted(room[name], self))
            if "way_that_agrees" in room:
                monkeypatch.setitem(room, "way_that_agrees", self.proof(room["way_that_agrees"]))

    def proof(self, way_that_agrees):
        def noted(*given):
            self.proving = True
            try:
                return way_that_agrees(*given)
            finally:
                self.proving = False

        return noted

    def unproved(self) -> list[tuple]:
        """What was launched and is in no proof: the kernel's name, and in what it differs from the nearest proof."""
        found = []
        for one in self.others - self.proved:
            apart = [set(one) ^ set(other) for other in self.proved if other[0] == one[0]]
            found.append((one[0], min(apart, key=len, default=set(one))))
        return found


class Noted:
    """A kernel whose launches are noted: its constants, numbers that are 1 or multiples of 16, and memory from a
    multiple of 16 bytes on."""

    def __init__(self, kernel, launches: Launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*given, **options):
            names = dict(zip(self.kernel.arg_names, given)) | options
            noted = self.launches.proved if self.launches.proving else self.launches.others
            noted.add((self.kernel.fn.__name__, *((name, kind(name, one)) for name, one in names.items())))
            return self.kernel[grid](*given, **options)

        return launch


def kind(name: str, one) -> object:
    if isinstance(one, torch.Tensor):
        return one.dtype, one.data_ptr() % 16 == 0
    if hasattr(one, "block_shape"):  # what the copy engine is told of memory
        return one.base.dtype, tuple(one.block_shape)
    if isinstance(one, float) or name == "rows":  # which no kernel is compiled for
        return type(one)
    constant = name.isupper() or name.startswith(("num_", "launch_"))
    return one if constant else (one == 1, one % 16 == 0)
