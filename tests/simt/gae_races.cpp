// Runs csrc/gae_kernels.cuh under ThreadSanitizer, three blocks at once, for tests/ops/test_gae_kernels.py. `gae_races
// N` leaves out the N-th barrier, where the test has put `if (left_out != N)` before each.
int left_out;

#include "gae.cpp"

#include <cstdlib>

int main(int, char** arguments) {
  left_out = std::atoi(arguments[1]);
  // Sequences of several windows too, which start where 16 bytes do not.
  const std::vector<int32_t> starts = {0, 3, 603, 603, 5609, 18013};
  const int64_t tokens = starts.back();
  std::vector<float> rewards(tokens, 1.0f), values(tokens, 0.5f), out(2 * tokens);
  std::vector<uint8_t> mask(tokens);
  for (int64_t i = 0; i < tokens; ++i) mask[i] = i % 3 != 0;
  for (const void* used : {static_cast<const void*>(nullptr), static_cast<const void*>(mask.data())}) {
    const Request request{rewards.data(),
                          values.data(),
                          starts.data(),
                          nullptr,
                          used,
                          out.data(),
                          out.data() + tokens,
                          tokens,
                          static_cast<int64_t>(starts.size()) - 1,
                          0.99,
                          0.95,
                          0,
                          0,
                          0,
                          3,
                          1};
    gae(&request);
  }
}
