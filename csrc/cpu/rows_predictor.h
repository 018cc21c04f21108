// Guesses a row's threshold key from the mean of the row's clamped keys, learning from the rows before.
// Part of rows_impl.h.
#pragma once

namespace wanda::cpu {
namespace {

constexpr int kFirstNan = 0x7fc0;  // the keys of NaNs start here; below are numbers and infinity (0x7f80)

// `mean` is the mean over the row of clamp(key - base, 0, span): a window around recent thresholds, four
// times as wide as they vary. Keys are logarithms, so the clamped mean is a robust location: outlier columns
// (a norm 100 times the others') and exact zeros hardly move it. A running linear regression turns it into
// the threshold.
//
// Standard deviation of the guess in keys (0.55 % of the threshold), 4096 normal weights, log-normal norms:
//                                    this   plain mean x ratio
//   rows of equal scale               0.6          2.5
//   row scales spread by 20 %         3.9          4.2
//   0.5 % of the norms 100x larger    0.6         12.2
class Predictor {
 public:
  int base() const { return base_; }
  int span() const { return span_; }
  // The mean error of recent guesses; 0 while there is nothing to guess from.
  float error() const { return error_; }

  float predict(float mean) const {
    return state_ == kRunning ? threshold_ + slope_ * (mean - mean_) : threshold_;
  }

  // `density`: the part of the row's keys that equals the threshold.
  void learn(float mean, float guess, float threshold, float density) {
    if (state_ == kEmpty) {
      threshold_ = threshold;
      deviation_ = 32;
      open_window();
      return;
    }
    const float miss = magnitude_of(threshold - guess);
    if (state_ == kOpened) {
      state_ = kRunning;
      rows_ = 0;
      const float inside = density * static_cast<float>(span_);
      const float start = 1.0f / (inside < 0.01f ? 0.01f : inside > 0.5f ? 0.5f : inside);
      slope_ = start;
      var_ = deviation_ * deviation_ / (start * start);
      cov_ = start * var_;
      mean_ = mean;
      threshold_ += kRate * (threshold - threshold_);
      error_ = deviation_ < 8 ? deviation_ : 8;
      return;
    }
    error_ += kRate * (miss - error_);
    error_ = error_ < kLeastError ? kLeastError : error_;
    const float dm = mean - mean_, dt = threshold - threshold_;
    mean_ += kRate * dm;
    threshold_ += kRate * dt;
    var_ += kRate * 0.5f * (dm * dm - var_) + 1e-9f;  // equal rows: never down to denormals
    cov_ += kRate * 0.5f * (dm * dt - cov_);
    const float ratio = var_ > 0 ? cov_ / var_ : 1.0f;
    slope_ = ratio < 0.3f ? 0.3f : ratio > 100 ? 100.0f : ratio;
    deviation_ += kRate * (magnitude_of(dt) - deviation_);
    const float half = 0.5f * static_cast<float>(span_), wanted = wanted_half();
    const bool off = magnitude_of(threshold_ - static_cast<float>(base_) - half) > 0.5f * half;
    if (++rows_ >= 16 && (off || wanted < 0.5f * half || wanted > 2.0f * half)) open_window();
  }

 private:
  enum State { kEmpty, kOpened, kRunning };
  static constexpr float kRate = 1.0f / 16;
  static constexpr float kLeastError = 0.6f;

  static float magnitude_of(float x) { return x < 0 ? -x : x; }
  float wanted_half() const { return deviation_ < 4 ? 16.0f : deviation_ > 80 ? 320.0f : 4 * deviation_; }

  void open_window() {
    const int half = static_cast<int>(wanted_half());
    const int base = static_cast<int>(threshold_) - half;
    span_ = 2 * half;
    base_ = base < 0 ? 0 : base > kFirstNan - span_ ? kFirstNan - span_ : base;
    error_ = 0.5f * deviation_ + 1;
    state_ = kOpened;
  }

  State state_ = kEmpty;
  int rows_ = 0;
  int base_ = 0;
  int span_ = 1;
  float threshold_ = 0;  // running means
  float mean_ = 0;
  float var_ = 0;  // of mean
  float cov_ = 0;
  float slope_ = 1;      // cov_ / var_, kept ready: the division would delay the next row's first step
  float deviation_ = 0;  // of threshold
  float error_ = 0;
};

}  // namespace
}  // namespace wanda::cpu
