// What is computed of a row before its product.
#pragma once

namespace edgelora {

// A root mean square norm.
struct Norm {
  const float* weight;
  float epsilon;
};

// The function of a gated MLP: x σ(x) for SwiGLU, and GELU in its tanh form for GeGLU, which is x σ(2 sqrt(2 / π) (x + 0.044715
// x³)).
enum class Activation { kSilu, kGelu };

}  // namespace edgelora
