"""Blocks of convolution, activation and batch layer normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_bln._checks import check_axes, check_bool, check_choice, check_floating, check_int
from lightning_bln.masks import blank, check_mask, convolved
from lightning_bln.norm import BatchLayerNorm

ORDERS = ("conv-act-norm", "conv-norm-act")
SPATIAL_AXES = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


class _ConvBLN(nn.Module):
    """The block of :class:`ConvBLN2d`, for any number of spatial axes."""

    convolution: ClassVar[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        activation: Callable[[Tensor], Tensor] | type[nn.Module] | None = nn.Tanh,
        order: str = "conv-act-norm",
        positions: str = "separate",
        eps: float = 1e-3,
        delta: float = 1e-4,
        affine: bool = True,
        scale: bool | float = True,
        population: str = "pooled",
        momentum: float | None = None,
        sync_batch_stats: bool = False,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_choice("order", order, ORDERS)
        if not (activation is None or callable(activation)):
            raise ValueError(f"activation={activation!r}, but it is not callable; pass nn.ReLU, torch.tanh or None")
        check_floating(dtype)
        self.order = order
        convolution: Any = self.convolution
        axes = next(number for kind, number in SPATIAL_AXES.items() if issubclass(convolution, kind))
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
            check_axes(name, value, axes, 1)
        if isinstance(padding, str):
            check_choice("padding", padding, ("same", "valid"))
        else:
            check_axes("padding", padding, axes, 0)
        self.conv = convolution(
            check_int("in_channels", in_channels, 1),
            check_int("out_channels", out_channels, 1),
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=check_int("groups", groups, 1),
            bias=check_bool("bias", bias),
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        if activation is None:
            activation = nn.Identity
        self.activation = activation() if isinstance(activation, type) else activation
        self.norm = BatchLayerNorm(
            out_channels,
            channel_dim=1,
            positions=positions,
            eps=eps,
            delta=delta,
            affine=affine,
            scale=scale,
            population=population,
            momentum=momentum,
            sync_batch_stats=sync_batch_stats,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the block.

        Args:
            x: ``(batch, in_channels, *spatial)``.
            mask: True where ``x`` holds data, bool, ``(batch, *spatial)``. The convolution reads zeros at padding.
                Where the output is padding, as :meth:`output_mask` says, it enters no statistic and is zero.
        """
        spatial = len(self.conv.kernel_size)
        if x.ndim != spatial + 2:
            raise ValueError(
                f"x has {x.ndim} axes of shape {tuple(x.shape)}, but {type(self).__name__} takes {spatial + 2}: "
                "(batch, in_channels, *spatial); add or drop axes"
            )
        if x.shape[1] != self.conv.in_channels:
            raise ValueError(
                f"in_channels={self.conv.in_channels}, but the input's channel axis (dim 1) has {x.shape[1]}; "
                "change one of them"
            )
        if mask is not None:
            return self._forward_masked(x, mask)
        y = self.conv(x)
        return self.norm(self.activation(y)) if self.order == "conv-act-norm" else self.activation(self.norm(y))

    def _forward_masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """:meth:`forward` with a mask."""
        fan = None if self.training else self.norm.fan
        if fan is not None:
            mask = fan.repeat_mask(mask, x.shape[0])
        check_mask(mask, x, channel_dim=1)
        y, mask = self.conv(blank(x, mask, channel_dim=1)), self.output_mask(mask)
        y = blank(y, mask, channel_dim=1)
        if self.order == "conv-act-norm":
            return self.norm(self.activation(y), mask)
        y = self.norm(y, mask)
        if fan is not None:
            mask = fan.repeat_mask(mask, y.shape[0])
        return blank(self.activation(y), mask, channel_dim=1)

    def output_mask(self, mask: Tensor) -> Tensor:
        """The mask of the output for a mask of the input, ``(batch, *spatial)``, for the layers that follow.

        A padded sample has as many outputs as the convolution gives it by itself, as a sequence of length ``n`` has by
        torch's formula. Along each axis, as many places under the kernel as the convolution pads at each end of its
        input may be without data; with ``padding="same"`` the kernel's centre decides, without padding all places do.
        """
        conv = self.conv
        return convolved(mask, conv.kernel_size, conv.stride, conv.padding, conv.dilation)

    def extra_repr(self) -> str:
        return f"order={self.order!r}"


class ConvBLN1d(_ConvBLN):
    """The block of :class:`ConvBLN2d` over one spatial axis: ``(batch, channels, length)``.

    Example:
        >>> ConvBLN1d(3, 8, 5, padding=2)(torch.randn(4, 3, 20)).shape
        torch.Size([4, 8, 20])
    """

    convolution = nn.Conv1d


class ConvBLN2d(_ConvBLN):
    """Convolution, activation and :class:`BatchLayerNorm` over the channels, in either order.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, which are the features of the norm.
        kernel_size: As for :class:`torch.nn.Conv2d`, as are ``stride`` to ``padding_mode``.
        activation: A module class (``nn.ReLU``), a module, a function (``torch.relu``), or ``None`` for none.
        order: ``"conv-act-norm"``, the paper's, or ``"conv-norm-act"``.
        positions: ``"separate"`` takes batch statistics at each pixel, as the authors do, which fixes the image size;
            ``"shared"`` takes them over pixels too, for images of any size.
        eps: As for :class:`BatchLayerNorm`, as are the remaining arguments.

    Shape:
        ``(batch, in_channels, height, width)`` to ``(batch, out_channels, height', width')``. A ``mask`` for the call
        is ``(batch, height, width)``, true where there is data; :meth:`output_mask` gives that of the output.

    Raises:
        ValueError: An option is unknown or out of range; or the input has another number of axes or channels, or with
            separate positions another size than those before, or its mask does not fit.
        TypeError: An option's type is wrong, or a mask holds no bools.

    Example:
        >>> block = ConvBLN2d(3, 6, 5, padding="same", activation=nn.ReLU, order="conv-norm-act")
        >>> block(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 6, 32, 32])

    Source:
        Ziaee and Cano, arXiv 2209.08898, section 4.
    """

    convolution = nn.Conv2d


class ConvBLN3d(_ConvBLN):
    """The block of :class:`ConvBLN2d` over three spatial axes: ``(batch, channels, depth, height, width)``.

    Example:
        >>> ConvBLN3d(1, 2, 3)(torch.randn(2, 1, 5, 5, 5)).shape
        torch.Size([2, 2, 3, 3, 3])
    """

    convolution = nn.Conv3d
