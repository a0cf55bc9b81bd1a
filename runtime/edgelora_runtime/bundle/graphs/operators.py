"""Operators that a bundle's graphs may use: those that export writes, by domain and name.

No operator runs a graph of its own (Loop, If, Scan), none is random, none reads or writes a file, and the only functions are
edgelora's. A test builds every kind of graph and holds these lists to what it finds.
"""

from __future__ import annotations

ONNX, CONTRIB, FUNCTIONS = "", "com.microsoft", "edgelora"
OPSETS = {ONNX: range(13, 27), CONTRIB: range(1, 2), FUNCTIONS: range(1, 2)}  # the versions of each domain
LIVE_PRODUCTS = frozenset(f"LiveMatMulNBits{parts}" for parts in (1, 2, 3))
# Products with what alone computes their activations.
JOINED_PRODUCTS = frozenset(
    {f"SkipNorm{product}" for product in ("MatMulNBits", *LIVE_PRODUCTS)}
    | {prologue + product for prologue in ("SwiGlu", "GeGlu") for product in ("MatMulNBits", "LiveMatMulNBits1")}
)
FUNCTION_NAMES = LIVE_PRODUCTS | JOINED_PRODUCTS

Operators = frozenset[tuple[str, str]]


def _name(domain: str, names: str) -> Operators:
    return frozenset((domain, name) for name in names.split())


# Of the bodies of our functions. Those of joined products call live ones.
LIVE_BODY = _name(ONNX, "Add Concat MatMul Split") | _name(CONTRIB, "FusedMatMul MatMulNBits")
JOINED_BODY = (
    _name(ONNX, "Gelu Mul Sigmoid Split")
    | _name(CONTRIB, "MatMulNBits SkipSimplifiedLayerNormalization")
    | _name(FUNCTIONS, " ".join(LIVE_PRODUCTS))
)

# Of graphs that export builds itself.
NATIVE = (
    LIVE_BODY
    | JOINED_BODY
    | _name(ONNX, "Cast Div Gather Gelu Mul Neg Range ReduceSum Reshape Shape Sigmoid SimplifiedLayerNormalization Slice Sub")
    | _name(ONNX, "Tanh Transpose Unsqueeze")
    | _name(CONTRIB, "GatherBlockQuantized GroupQueryAttention SkipSimplifiedLayerNormalization")
    | _name(FUNCTIONS, " ".join(FUNCTION_NAMES))
)

# Of graphs that Optimum traced, which are of many kinds. A superset: arithmetic, comparisons, and what moves and shapes tensors.
TRACED = (
    NATIVE
    | _name(ONNX, "Abs And ArgMax ArgMin Ceil Clip Constant ConstantOfShape Cos CumSum Einsum Elu Equal Erf Exp")
    | _name(ONNX, "Expand Flatten Floor GatherElements GatherND Gemm Greater GreaterOrEqual HardSigmoid HardSwish")
    | _name(ONNX, "Identity InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log")
    | _name(ONNX, "LogSoftmax Max Mean Min Mish Mod Not Or Pad Pow Reciprocal ReduceMax ReduceMean")
    | _name(ONNX, "ReduceMin ReduceProd Relu RMSNormalization Round ScatterElements ScatterND Sign Sin Softmax")
    | _name(ONNX, "Softplus Sqrt Squeeze Sum Tile TopK Trilu Where Xor")
)
PRODUCTS = frozenset({"FusedMatMul", "Gemm", "MatMul", "MatMulNBits", *FUNCTION_NAMES})  # nodes that read a whole weight
