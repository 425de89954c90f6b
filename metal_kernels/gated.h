// The activation functions of a gated feed-forward block, operation by operation as numpy_ref.gated and numpy_ref.exp.

// 1.5 * 2^23: a float of up to 2^22 added to it keeps no bit below 1, so the addition rounds half to even, and the low
// bits of the sum are the integer. Two additions, where rint may be one of the slow conversions.
#define ROUNDING 12582912.0f

// e^x for |x| within float32's range; the polynomial is Taylor's to r^7, ln 2 comes in two parts.
FN float reference_exp(float x) {
  x = x > -87.0f ? x : -87.0f;
  x = x < 88.0f ? x : 88.0f;
  const float shifted = add_rn(mul_rn(x, 1.4426950408889634f), ROUNDING);
  const float n = add_rn(shifted, -ROUNDING);
  const float high = add_rn(x, -mul_rn(n, 0.693359375f));
  const float r = add_rn(high, -mul_rn(n, -2.12194440054690581e-4f));
  float p = add_rn(mul_rn(1.98412698e-4f, r), 1.38888892e-3f);
  p = add_rn(mul_rn(p, r), 8.33333377e-3f);
  p = add_rn(mul_rn(p, r), 4.16666679e-2f);
  p = add_rn(mul_rn(p, r), 1.66666672e-1f);
  p = add_rn(mul_rn(p, r), 5.0e-1f);
  const float y = add_rn(add_rn(mul_rn(p, mul_rn(r, r)), r), 1.0f);
  return mul_rn(y, as_type<float>((as_type<uint>(shifted) + 127u) << 23));
}

// ACT 1: max(gate, 0)^2 * up. ACT 2: gate / (1 + e^-gate) * up.
template <int ACT>
FN float gated_value(float gate, float up) {
  if (ACT == 1) {
    const float positive = gate > 0.0f ? gate : 0.0f;
    return mul_rn(mul_rn(positive, positive), up);
  }
  return mul_rn(div_rn(gate, add_rn(1.0f, reference_exp(-gate))), up);
}
