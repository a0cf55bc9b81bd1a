// edgelora.AddLowRank1 … 3: what a live adapter adds to a product, y + B·A·x, one A for all parts of the product and a B for
// each.
//
// Graphs say what these are in standard operators, as functions; onnxruntime runs those where it does not have this library.
#include <algorithm>
#include <cstring>

#include "operators.h"

namespace edgelora {
namespace {

enum Input : size_t { kProduct, kActivations, kDown, kUp };

constexpr size_t kMostParts = 3;
constexpr size_t kRowsAtOnce = 32;
constexpr size_t kDownRows = 4, kUpColumns = 256;  // of pieces, where one row leaves them to the threads

class AddLowRank : Operator {
 public:
  AddLowRank(const Api& api, const OrtKernelInfo* info, const Kernels& kernels)
      : Operator(api, info, "AddLowRank"), kernels_(kernels), parts_(inputs_ - kUp) {}

  void compute(OrtKernelContext* context) const {
    const OrtValue *y = input(context, kProduct), *x = input(context, kActivations);
    const Shape product = describe(api_, y), activations = describe(api_, x);
    if (product.sizes.empty() || product.sizes.size() != activations.sizes.size())
      refuse("the product and its activations do not fit");
    size_t rows = 1;
    for (size_t axis = 0; axis + 1 < product.sizes.size(); ++axis) {
      if (product.sizes[axis] != activations.sizes[axis]) refuse("the product and its activations do not fit");
      rows *= static_cast<size_t>(product.sizes[axis]);
    }
    const Factors factors = read_factors(context);
    if (factors.starts[parts_] != static_cast<size_t>(product.sizes.back()) ||
        factors.down.columns != static_cast<size_t>(activations.sizes.back()))
      refuse("the factors do not fit the product");
    add(context, rows, read<float>(y), read<float>(x), factors, make_output(context, 0, product.sizes));
  }

 private:
  // A and the B's, and the column of the product that each B begins at; behind the last its width.
  struct Factors {
    Matrix down, ups[kMostParts];
    size_t starts[kMostParts + 1];
  };

  Factors read_factors(const OrtKernelContext* context) const {
    Factors factors{};
    factors.down = matrix(context, kDown);
    for (size_t part = 0; part < parts_; ++part) {
      const Matrix& up = factors.ups[part] = matrix(context, kUp + part);
      if (up.rows * parts_ != factors.down.rows) refuse("the ranks of A and B do not fit");
      factors.starts[part + 1] = factors.starts[part] + up.columns;
    }
    return factors;
  }

  Matrix matrix(const OrtKernelContext* context, size_t index) const {
    const OrtValue* tensor = input(context, index);
    const Shape shape = describe(api_, tensor);
    if (shape.sizes.size() != 2) refuse("a factor is not a matrix");
    return {read<float>(tensor), static_cast<size_t>(shape.sizes[0]), static_cast<size_t>(shape.sizes[1])};
  }

  // One row shares out its columns, many are shared out themselves.
  void add(OrtKernelContext* context, size_t rows, const float* y, const float* x, const Factors& factors, float* out) const {
    const Matrix &down = factors.down, *ups = factors.ups;
    const size_t* starts = factors.starts;
    const size_t rank = down.rows / parts_, width = starts[parts_];
    const size_t down_bytes = down.rows * down.columns * sizeof(float), up_bytes = rank * width * sizeof(float);
    static thread_local std::vector<float> narrow;
    if (rows != 1) {
      return parallel(context, (rows + kRowsAtOnce - 1) / kRowsAtOnce, (down_bytes + up_bytes) * rows, [&](size_t index) {
        const size_t row = index * kRowsAtOnce, count = std::min(kRowsAtOnce, rows - row);
        narrow.resize(count * down.rows);
        kernels_.multiply_transposed(x + row * down.columns, count, down, 0, down.rows, narrow.data());
        for (size_t part = 0; part < parts_; ++part) {
          const size_t at = row * width + starts[part];
          kernels_.add_low_rank(narrow.data() + part * rank, down.rows, count, ups[part], 0, ups[part].columns, y + at, out + at,
                                width);
        }
      });
    }
    narrow.resize(down.rows);
    float* const between = narrow.data();
    parallel(context, (down.rows + kDownRows - 1) / kDownRows, down_bytes, [&](size_t index) {
      kernels_.multiply_transposed(x, 1, down, index * kDownRows, std::min((index + 1) * kDownRows, down.rows), between);
    });
    parallel(context, (width + kUpColumns - 1) / kUpColumns, up_bytes, [&](size_t index) {
      for (size_t part = 0; part < parts_; ++part) {
        const size_t begin = std::max(index * kUpColumns, starts[part]),
                     end = std::min((index + 1) * kUpColumns, starts[part + 1]);
        if (begin >= end) continue;
        kernels_.add_low_rank(between + part * rank, down.rows, 1, ups[part], begin - starts[part], end - starts[part],
                              y + starts[part], out + starts[part], width);
      }
    });
  }

  const Kernels& kernels_;
  size_t parts_;
};

template <size_t Parts>
CustomOp describe_operator() {
  static constexpr const char* kNames[] = {"AddLowRank1", "AddLowRank2", "AddLowRank3"};
  CustomOp described;
  describe_life<AddLowRank>(described);
  described.name = [](const CustomOp*) { return kNames[Parts - 1]; };
  described.input_count = [](const CustomOp*) { return kUp + Parts; };
  described.input_type = [](const CustomOp*, size_t) -> int { return kFloat; };
  described.input_presence = [](const CustomOp*, size_t) -> int { return kRequired; };
  described.output_count = [](const CustomOp*) { return size_t{1}; };
  return described;
}

}  // namespace

const std::array<CustomOp, 3>& add_low_rank() {
  static const std::array<CustomOp, kMostParts> described{describe_operator<1>(), describe_operator<2>(), describe_operator<3>()};
  return described;
}

}  // namespace edgelora
