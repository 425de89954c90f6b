// W neighbouring words of a row in one load.
template <int W>
struct Words;
template <>
struct Words<1> {
  typedef uint type;
  static FN uint at(type u, uint) { return u; }
};
template <>
struct Words<2> {
  typedef uint2 type;
  static FN uint at(type u, uint j) { return j == 0 ? u.x : u.y; }
};
template <>
struct Words<4> {
  typedef uint4 type;
  static FN uint at(type u, uint j) { return j == 0 ? u.x : j == 1 ? u.y : j == 2 ? u.z : u.w; }
};
