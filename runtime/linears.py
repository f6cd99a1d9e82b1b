"""
Linear layers that only generate, on a CPU: packed for its matmuls, or with weights of 8 or 4 bits.

A token needs all weights once, so with one sequence most of the time goes to reading them.
"""
import warnings

import torch
import torch.nn as nn

from runtime.originals import is_unchanged

GROUP = 32  # inputs that share a scale in 4 bits; torch has no kernel for fewer


def list_linears(model):
    """(dict of modules, name, layer) of each linear layer on a CPU that nobody has changed."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if is_unchanged(child, 'Linear') and child.weight.device.type == 'cpu' and all(
                    type(p) is nn.Parameter for p in child.parameters()):  # a subclass is a change
                yield parent._modules, name, child


def count_bytes(model):
    """The bytes of the model's layers that are packed; 0 without any."""
    return sum(layer.num_bytes for layer in model.modules() if isinstance(layer, FrozenLinear))


def pack(linear, name, rows, weights='auto'):
    """The form of a linear layer for inference.pack_linears(), or itself if there is no other."""
    # in 4 bits lm_head would lose a fifth as much quality as all other layers of a small model
    if weights == 'int4' and name != 'lm_head' and Int4Linear.fits(linear):
        return Int4Linear(linear)
    if weights in ('int8', 'int4'):
        return Int8Linear(linear)
    return PackedLinear(linear, rows) if PackedLinear.fits(linear) else linear


class FrozenLinear(nn.Module):
    """What these layers have in common: RuntimeError if they are to be trained, saved or copied."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.training = False

    def train(self, mode=True):
        if mode:
            raise_frozen('trained')
        return self

    def __getstate__(self):
        raise_frozen('copied or saved')

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        raise_frozen('saved')

    def _load_from_state_dict(self, *args):
        raise_frozen('loaded')


def raise_frozen(verb):
    raise RuntimeError(f'the weights of this model were packed for generation, so it cannot be '
                       f'{verb}: use a model from the checkpoint')


def check_grad(x):
    """RuntimeError if a gradient of the inputs is wanted, as these layers have none."""
    if x.requires_grad and torch.is_grad_enabled():
        raise_frozen('trained')


def split_rows(weight):
    """Slices of its rows, so few that what is computed from them stays in the CPU's cache."""
    return [slice(i, i + 256) for i in range(0, len(weight), 256)]


class PackedLinear(FrozenLinear):
    """A linear layer whose weight has the blocks in which oneDNN multiplies this many rows."""

    def __init__(self, linear, rows):
        super().__init__(linear)
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias
        self.num_bytes = linear.weight.nbytes

    @staticmethod
    def fits(linear):
        """Whether oneDNN can multiply this dtype on this machine."""
        if not torch.backends.mkldnn.is_available():
            return False
        if linear.weight.dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return linear.weight.dtype == torch.float32

    @property
    def weight(self):  # for a model that somebody has changed so that it reads this
        return self.blocks.to_dense()

    def forward(self, x):
        check_grad(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, 'none', [], '')


class Int8Linear(FrozenLinear):
    """A linear layer with weights of 8 bits and a scale for each output.

    Its inputs are rounded to 8 bits, too. torch._weight_int8pack_mm leaves them as they are, but
    it takes as long as bfloat16.
    """

    def __init__(self, linear):
        super().__init__(linear)
        weight = linear.weight.detach()
        numbers = torch.empty_like(weight, dtype=torch.int8)
        scales = weight.new_empty(self.out_features, dtype=torch.double)
        for rows in split_rows(weight):
            part = weight[rows].float()
            scales[rows] = part.abs().amax(dim=1).clamp(min=1e-20) / 127
            numbers[rows] = (part / scales[rows, None].float()).round()
        zeros = torch.zeros(self.out_features, dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch plans to remove tensors of this kind
            numbers = torch._make_per_channel_quantized_tensor(numbers, scales, zeros, 0)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.blocks = torch.ops.quantized.linear_prepack(numbers, bias)
        self.num_bytes = weight.numel() + 4 * self.out_features
        self.dtype = weight.dtype
        # without VNNI the products of 8 bits could overflow
        self.reduces_range = not torch.cpu._is_vnni_supported()

    @property
    def weight(self):
        return self.blocks.unpack()[0].dequantize().to(self.dtype)

    def forward(self, x):
        check_grad(x)
        y = torch.ops.quantized.linear_dynamic(x.float(), self.blocks, self.reduces_range)
        return y.type_as(x)


def round_groups(groups):
    """(scales, offsets, whole numbers from -8 to 7) for weights in groups (..., GROUP).

    The first scales reach from the smallest to the largest weight. Then scales and offsets are
    fitted to the numbers by least squares, so the root mean square of the errors is 6% smaller.
    """
    def find_numbers():
        return ((groups - offset) / scale.clamp_(min=1e-20)).round_().clamp_(-8, 7)

    low = groups.amin(dim=-1, keepdim=True)
    scale = (groups.amax(dim=-1, keepdim=True) - low) / 15  # aminmax() is three times slower
    offset = low + 8 * scale
    for _ in range(2):
        numbers = find_numbers()
        mean_number, mean = numbers.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
        deviations = numbers - mean_number
        variance = deviations.square().sum(-1, keepdim=True).clamp_(min=1e-6)
        scale = (deviations * (groups - mean)).sum(-1, keepdim=True) / variance
        offset = mean - scale * mean_number
    numbers = find_numbers()
    return scale, offset, numbers


class Int4Linear(FrozenLinear):
    """A linear layer with weights of 4 bits. Each group of inputs has a scale and an offset."""

    def __init__(self, linear):
        super().__init__(linear)
        weight = linear.weight.detach()
        numbers = torch.empty_like(weight, dtype=torch.int)
        num_groups = self.in_features // GROUP
        self.scales = weight.new_empty(num_groups, self.out_features, 2)  # scales and offsets
        for rows in split_rows(weight):
            groups = weight[rows].float().unflatten(1, (num_groups, GROUP))
            scale, offset, groups_numbers = round_groups(groups)
            numbers[rows] = groups_numbers.flatten(1) + 8
            self.scales[:, rows] = torch.cat((scale, offset), dim=2).transpose(0, 1)
        self.blocks = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
        self.bias = linear.bias
        self.num_bytes = self.blocks.nbytes + self.scales.nbytes

    @staticmethod
    def fits(linear):
        """Whether torch has a kernel for a layer of this size."""
        return linear.in_features % GROUP == 0 and linear.out_features % 16 == 0

    @property
    def weight(self):
        identity = torch.eye(self.in_features, dtype=self.scales.dtype)
        return torch._weight_int4pack_mm_for_cpu(identity, self.blocks, GROUP, self.scales).T

    def forward(self, x):
        check_grad(x)
        if x.dim() > 2:
            return self.forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        y = torch._weight_int4pack_mm_for_cpu(x, self.blocks, GROUP, self.scales)
        return y if self.bias is None else y + self.bias
