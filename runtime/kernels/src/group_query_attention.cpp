// com.microsoft.GroupQueryAttention over a cache that is written in place. Keys and values are read once for all queries that
// share them, and softmax needs no memory that grows with the text.
//
// It supports what edgelora's graphs use: float32, rotary embeddings in halves, texts of any length beside each other. Anything
// else is refused. Partial results of spans are merged in order, so no bit of a row depends on the rows computed with it, on the
// other texts or on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "operators.h"

namespace edgelora {
namespace {

enum Input : size_t { kQuery, kKey, kValue, kPastKey, kPastValue, kLast, kTotal, kCos, kSin, kInputs };
enum Output : size_t { kAttended, kPresentKey, kPresentValue, kOutputs };

constexpr size_t kRowsAtOnce = 48;  // queries that read a head's keys together

// Rows of heads in a tensor: the heads of a position are adjacent.
struct Rows {
  const float* values;
  size_t width;  // values per position

  const float* at(size_t position, size_t head, size_t size) const { return values + position * width + head * size; }
};

// Rotary position embedding: cos and sin are (positions, half); values after 2 * half are not rotated.
struct Rotary {
  const float* cos = nullptr;
  const float* sin = nullptr;
  size_t half = 0, positions = 0;

  void rotate(const float* from, size_t position, size_t size, float scale, float* to) const {
    const float *cosine = cos + position * half, *sine = sin + position * half;
    for (size_t i = 0; i < half; ++i) {
      const float first = from[i] * scale, second = from[half + i] * scale;
      to[i] = first * cosine[i] - second * sine[i];
      to[half + i] = second * cosine[i] + first * sine[i];
    }
    for (size_t i = 2 * half; i < size; ++i) to[i] = from[i] * scale;
  }
};

// Reusable memory for a PartialSoftmax.
struct PartialSoftmaxBuffer {
  std::vector<float> values, maxima, sums;

  PartialSoftmax fit(size_t rows, size_t size) {
    if (values.size() < rows * size) values.resize(rows * size);
    if (sums.size() < rows) maxima.resize(rows), sums.resize(rows);
    return {values.data(), maxima.data(), sums.data()};
  }
};

PartialSoftmax advance_rows(const PartialSoftmax& partial, size_t rows, size_t size) {
  return {partial.values + rows * size, partial.maxima + rows, partial.sums + rows};
}

class GroupQueryAttention : Operator {
 public:
  GroupQueryAttention(const Api& api, const OrtKernelInfo* info, const Kernels& kernels)
      : Operator(api, info, "GroupQueryAttention"), kernels_(kernels) {
    const int64_t heads = attribute(info, "num_heads", int64_t{0}), kv_heads = attribute(info, "kv_num_heads", int64_t{0});
    if (kv_heads < 1 || heads < 1 || heads > 1 << 16 || heads % kv_heads) refuse("num_heads is not a multiple of kv_num_heads");
    if (attribute(info, "rotary_interleaved", int64_t{0}) != 0) refuse("rotary_interleaved is not supported");
    if (attribute(info, "smooth_softmax", int64_t{0}) > 0) refuse("smooth_softmax is not supported");
    if (attribute(info, "causal", int64_t{1}) != 1) refuse("causal = 0 is not supported");
    if (attribute(info, "sliding_window_cache", int64_t{0}) != 0) refuse("sliding_window_cache is not supported");
    heads_ = static_cast<size_t>(heads);
    kv_heads_ = static_cast<size_t>(kv_heads);
    group_ = heads_ / kv_heads_;
    window_ = static_cast<size_t>(std::max(attribute(info, "local_window_size", int64_t{-1}), int64_t{0}));
    rotates_ = attribute(info, "do_rotary", int64_t{0}) != 0;
    scale_ = attribute(info, "scale", 0.0f);
    cap_ = attribute(info, "softcap", 0.0f);
  }

  void compute(OrtKernelContext* context) const {
    static thread_local std::vector<Step> steps;  // the thread's next call reuses the memory
    read_steps(context, steps);
    append(context, steps);
    steps.size() == 1 ? attend(context, steps[0]) : attend(context, steps);
  }

 private:
  // One text of a call: `count` new positions after `past` earlier ones.
  struct Step {
    size_t size, past, count, capacity;
    Rows query, key, value;
    Rotary rotary;
    const float *past_keys, *past_values;  // (kv_heads, past_capacity, size)
    size_t past_capacity;
    float *keys, *values;  // (kv_heads, capacity, size)
    float* attended;       // (count, heads, size)
  };

  void read_steps(OrtKernelContext* context, std::vector<Step>& steps) const {
    Step step{};
    const OrtValue *query = input(context, kQuery), *key = input(context, kKey), *value = input(context, kValue);
    const Shape shape = describe_rows(query);
    const size_t texts = static_cast<size_t>(shape.sizes[0]), width = static_cast<size_t>(shape.sizes[2]);
    step.count = static_cast<size_t>(shape.sizes[1]);
    if (texts == 0 || step.count == 0) refuse("the query has no positions");
    const size_t parts = key ? heads_ : heads_ + 2 * kv_heads_;
    step.size = width / parts;
    if (width % parts || step.size == 0 || step.size % 16) refuse("the size of a head is not a multiple of 16");
    step.query = {read<float>(query), width};
    if (key && value) {
      const std::vector<int64_t> wanted{shape.sizes[0], shape.sizes[1], static_cast<int64_t>(kv_heads_ * step.size)};
      if (describe_rows(key).sizes != wanted || describe_rows(value).sizes != wanted) {
        refuse("query, key and value do not match");
      }
      step.key = {read<float>(key), kv_heads_ * step.size};
      step.value = {read<float>(value), kv_heads_ * step.size};
    } else if (!key && !value) {
      step.key = {step.query.values + heads_ * step.size, width};
      step.value = {step.key.values + kv_heads_ * step.size, width};
    } else {
      refuse("key is given without value, or value without key");
    }
    const int32_t *last = read_numbers(context, kLast, texts), *room = read_numbers(context, kTotal, 1);
    read_past(context, step, texts);
    step.capacity = std::max(step.past_capacity, static_cast<size_t>(std::max(*room, 0)));
    if (rotates_) step.rotary = read_rotary(context, step);

    const auto sizes = [&](size_t first, size_t second, size_t third) {
      return std::vector<int64_t>{shape.sizes[0], static_cast<int64_t>(first), static_cast<int64_t>(second),
                                  static_cast<int64_t>(third)};
    };
    step.keys = make_output(context, kPresentKey, sizes(kv_heads_, step.capacity, step.size));
    step.values = make_output(context, kPresentValue, sizes(kv_heads_, step.capacity, step.size));
    step.attended = make_output(context, kAttended, {shape.sizes[0], shape.sizes[1], static_cast<int64_t>(heads_ * step.size)});
    steps.clear();
    for (size_t text = 0; text < texts; ++text) {
      const int64_t total = last[text] + int64_t{1};
      if (total < static_cast<int64_t>(step.count) || *room < total)
        refuse("seqlens_k and total_sequence_length do not match the query");
      step.past = static_cast<size_t>(total) - step.count;
      if (step.past > step.past_capacity) refuse("seqlens_k exceeds the positions of past_key");
      if (rotates_ && step.past + step.count > step.rotary.positions) refuse("cos_cache has too few positions");
      steps.push_back(step);
      step.query.values += step.count * step.query.width;
      step.key.values += step.count * step.key.width;
      step.value.values += step.count * step.value.width;
      step.attended += step.count * heads_ * step.size;
      step.keys += kv_heads_ * step.capacity * step.size;
      step.values += kv_heads_ * step.capacity * step.size;
      if (step.past_keys) step.past_keys += kv_heads_ * step.past_capacity * step.size;
      if (step.past_values) step.past_values += kv_heads_ * step.past_capacity * step.size;
    }
  }

  // The shape of rows (texts, count, width).
  Shape describe_rows(const OrtValue* tensor) const {
    Shape shape = describe(api_, tensor);
    if (shape.type != kFloat || shape.sizes.size() != 3) refuse("an input is not float32 of (texts, positions, width)");
    return shape;
  }

  const int32_t* read_numbers(const OrtKernelContext* context, Input index, size_t count) const {
    const OrtValue* value = input(context, index);
    int64_t found = 1;
    for (const int64_t size : describe(api_, value).sizes) found *= size;
    if (found != static_cast<int64_t>(count))
      refuse("seqlens_k is not one number for each text, or total_sequence_length not one");
    return read<int32_t>(value);
  }

  void read_past(const OrtKernelContext* context, Step& step, size_t texts) const {
    const OrtValue *keys = input(context, kPastKey), *values = input(context, kPastValue);
    if (keys && values) {
      const Shape shape = describe(api_, keys), other = describe(api_, values);
      const bool fits = shape.sizes.size() == 4 && shape.sizes[0] == static_cast<int64_t>(texts) &&
                        shape.sizes[1] == static_cast<int64_t>(kv_heads_) && shape.sizes[3] == static_cast<int64_t>(step.size) &&
                        shape.type == kFloat;
      if (!fits || other.sizes != shape.sizes || other.type != kFloat) refuse("past_key or past_value does not match the query");
      step.past_keys = read<float>(keys);
      step.past_values = read<float>(values);
      step.past_capacity = static_cast<size_t>(shape.sizes[2]);
    }
  }

  Rotary read_rotary(const OrtKernelContext* context, const Step& step) const {
    const OrtValue *cos = input(context, kCos), *sin = input(context, kSin);
    if (!cos || !sin) refuse("cos_cache or sin_cache is missing");
    const Shape shape = describe(api_, cos), other = describe(api_, sin);
    if (shape.sizes.size() != 2 || shape.type != kFloat || other.sizes != shape.sizes || other.type != kFloat) {
      refuse("cos_cache and sin_cache are not float32 with two axes");
    }
    const size_t half = static_cast<size_t>(shape.sizes[1]);
    if (2 * half > step.size) refuse("cos_cache is wider than a head");
    return {read<float>(cos), read<float>(sin), half, static_cast<size_t>(shape.sizes[0])};
  }

  // Copies the earlier positions, unless past and present are one buffer.
  void copy_past(const Step& step, const float* past, float* present) const {
    if (past == present || step.past == 0) return;
    for (size_t head = 0; head < kv_heads_; ++head) {
      std::memcpy(present + head * step.capacity * step.size, past + head * step.past_capacity * step.size,
                  step.past * step.size * sizeof(float));
    }
  }

  // Writes the new positions after the earlier ones.
  void append(OrtKernelContext* context, const std::vector<Step>& steps) const {
    for (const Step& step : steps) {
      copy_past(step, step.past_keys, step.keys);
      copy_past(step, step.past_values, step.values);
    }
    const size_t count = steps[0].count, size = steps[0].size;
    parallel(context, steps.size() * count, 2 * steps.size() * count * kv_heads_ * size * sizeof(float), [&](size_t index) {
      const Step& step = steps[index / count];
      const size_t row = index % count, position = step.past + row;
      for (size_t head = 0; head < kv_heads_; ++head) {
        const size_t to = (head * step.capacity + position) * size;
        step.rotary.rotate(step.key.at(row, head, size), position, size, 1.0f, step.keys + to);
        std::memcpy(step.values + to, step.value.at(row, head, size), size * sizeof(float));
      }
    });
  }

  // With many positions, a thread takes some of them over all spans; with few, it takes whole spans, which are merged afterwards.
  void attend(OrtKernelContext* context, const Step& step) const {
    const size_t positions = std::max<size_t>(1, kRowsAtOnce / group_);  // per piece
    const size_t pieces = (step.count + positions - 1) / positions;
    if (pieces != 1) {
      return parallel(context, kv_heads_ * pieces, pieces * count_bytes(step),
                      [&](size_t index) { attend_piece(step, index / pieces, index % pieces * positions, positions); });
    }
    const size_t first = first_span(step, 0), spans = (step.past + step.count - 1) / kSpan + 1 - first,
                 rows = step.count * group_;
    static thread_local PartialSoftmaxBuffer all;
    const PartialSoftmax partial = all.fit(kv_heads_ * spans * rows, step.size);
    parallel(context, kv_heads_ * spans, count_bytes(step), [&](size_t index) {
      attend_span(step, index / spans, 0, step.count, first + index % spans, advance_rows(partial, index * rows, step.size));
    });
    for (size_t head = 0; head < kv_heads_; ++head) {
      const PartialSoftmax sum = advance_rows(partial, head * spans * rows, step.size);
      for (size_t span = 1; span < spans; ++span) add(step, step.count, sum, advance_rows(sum, span * rows, step.size));
      write(step, head, 0, step.count, sum);
    }
  }

  // With several texts, a thread takes some positions of one text over all its spans.
  void attend(OrtKernelContext* context, const std::vector<Step>& steps) const {
    const size_t positions = std::max<size_t>(1, kRowsAtOnce / group_);  // per piece
    const size_t pieces = (steps[0].count + positions - 1) / positions, per_text = kv_heads_ * pieces;
    size_t bytes = 0;
    for (const Step& step : steps) bytes += pieces * count_bytes(step);
    parallel(context, steps.size() * per_text, bytes, [&](size_t index) {
      attend_piece(steps[index / per_text], index % per_text / pieces, index % pieces * positions, positions);
    });
  }

  // Bytes of the keys and values that a text's queries can see.
  size_t count_bytes(const Step& step) const { return 2 * (step.past + step.count) * kv_heads_ * step.size * sizeof(float); }

  // Attention of a head for up to `positions` positions, from the row on.
  void attend_piece(const Step& step, size_t head, size_t row, size_t positions) const {
    static thread_local PartialSoftmaxBuffer sums, spans;
    const size_t count = std::min(positions, step.count - row);
    const PartialSoftmax sum = sums.fit(count * group_, step.size), span = spans.fit(count * group_, step.size);
    const size_t first = first_span(step, row), last = (step.past + row + count - 1) / kSpan;
    attend_span(step, head, row, count, first, sum);
    for (size_t next = first + 1; next <= last; ++next) {
      attend_span(step, head, row, count, next, span);
      add(step, count, sum, span);
    }
    write(step, head, row, count, sum);
  }

  // The first span that the queries of a row see.
  size_t first_span(const Step& step, size_t row) const {
    const size_t seen = step.past + row + 1;
    return window_ && seen > window_ ? (seen - window_) / kSpan : 0;
  }

  void attend_span(const Step& step, size_t head, size_t row, size_t count, size_t span, const PartialSoftmax& partial) const {
    static thread_local std::vector<float> rotated;
    if (rotated.size() < count * group_ * step.size) rotated.resize(count * group_ * step.size);
    const float scale = scale_ == 0.0f ? 1.0f / std::sqrt(static_cast<float>(step.size)) : scale_;
    for (size_t i = 0; i < count * group_; ++i) {
      const float* query = step.query.at(row + i / group_, head * group_ + i % group_, step.size);
      step.rotary.rotate(query, step.past + row + i / group_, step.size, scale, rotated.data() + i * step.size);
    }
    const size_t to = head * step.capacity * step.size, end = std::min((span + 1) * kSpan, step.past + row + count);
    const Head seen{step.keys + to, step.values + to, step.capacity, step.size, cap_, window_};
    kernels_.attend(seen, {rotated.data(), count * group_, step.past + row, group_}, span * kSpan, end, partial);
  }

  void add(const Step& step, size_t count, const PartialSoftmax& sum, const PartialSoftmax& other) const {
    kernels_.merge_partials(step.size, count * group_, sum, other);
  }

  void write(const Step& step, size_t head, size_t row, size_t count, const PartialSoftmax& partial) const {
    for (size_t i = 0; i < count * group_; ++i) {
      float* to = step.attended + ((row + i / group_) * heads_ + head * group_ + i % group_) * step.size;
      for (size_t place = 0; place < step.size; ++place) to[place] = partial.values[i * step.size + place] / partial.sums[i];
    }
  }

  const Kernels& kernels_;
  size_t heads_, kv_heads_, group_, window_;
  bool rotates_;
  float scale_, cap_;
};

CustomOp describe_operator() {
  CustomOp described;
  describe_lifecycle<GroupQueryAttention>(described);
  described.name = [](const CustomOp*) { return "GroupQueryAttention"; };
  described.input_count = [](const CustomOp*) { return size_t{kInputs}; };
  described.input_type = [](const CustomOp*, size_t index) -> int {
    return index == kQuery ? kFloat : index == kLast || index == kTotal ? kInt32 : kAnyType;
  };
  described.input_presence = [](const CustomOp*, size_t index) -> int {
    return index == kQuery || index == kLast || index == kTotal ? kRequired : kOptional;
  };
  described.output_count = [](const CustomOp*) { return size_t{kOutputs}; };
  return described;
}

}  // namespace

const CustomOp& group_query_attention() {
  static const CustomOp described = describe_operator();
  return described;
}

}  // namespace edgelora
