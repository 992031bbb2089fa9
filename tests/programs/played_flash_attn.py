"""As much of the package flash-attn as the choice of a kernel looks at; it needs a GPU and cannot be had here."""


def flash_attn_varlen_func():
    pass
