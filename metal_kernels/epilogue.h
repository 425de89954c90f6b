// From whole-number accumulators to outputs, the reference's operations in the reference's order. After common.h.

// y = (acc / s) * scale: acc a sum of products, s the scale of its row of activations, scale the weight's.
FN float scaled(float acc, float s, float scale) { return mul_rn(div_rn(acc, s), scale); }

// The scale of row n of the weight. SCALES: 0 one for the tensor, 1 one for each row. For groups of 128 see the bodies:
// the groups' scaled sums are added in ascending order, starting from +0.
template <int SCALES, typename P>
FN float scale_of(P scale, uint n) { return scale[SCALES == 0 ? 0u : n]; }

// T(y + bias); then the residual: T(residual + that), so that fused and unfused results are the same in every T.
// Call it so: finish<T, BIAS, RESIDUAL>(y, BIAS ? bias[n] : 0.0f, RESIDUAL ? float(residual[at]) : 0.0f)
template <typename T, bool BIAS, bool RESIDUAL>
FN T finish(float y, float bias, float residual) {
  T out = T(BIAS ? add_rn(y, bias) : y);
  return RESIDUAL ? T(add_rn(residual, float(out))) : out;
}
