// The sampler's batch call: the bits of sampler.py, splits.py and permutation.py, which explain the method and are the
// oracle of its tests; and the reading of a sample's tokens, as in reader.py. Everything is checked on the way in, so that
// no argument can make a walk leave its tables.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace py = pybind11;

namespace {

constexpr int kInterface = 1;  // as INTERFACE in native.py
constexpr int kOneBits = 62;
constexpr int kDeficitBits = 40;
constexpr int kHalfRounds = 12;  // 2 x FEISTEL_ROUNDS
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
constexpr int64_t kMost = int64_t{1} << 60;  // samples, and slices of a source
using Wide = unsigned __int128;

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <typename T>
std::vector<T> values(const Array<T>& array, const char* name) {
  if (array.ndim() != 1) throw py::value_error(std::string(name) + " must have one dimension");
  return std::vector<T>(array.data(), array.data() + array.size());
}

void require(bool condition, const char* what) {
  if (!condition) throw py::value_error(what);
}

// ------------------------------------------------------------------------------------------------------ permutation

inline uint64_t mix(uint64_t word) {
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
  return word ^ (word >> 31);
}

// x % divisor by a product with the reciprocal: a division would take most of the time of a round.
struct Modulus {
  uint64_t divisor, reciprocal;
  explicit Modulus(uint64_t d) : divisor(d), reciprocal(std::numeric_limits<uint64_t>::max() / d) {}
  uint64_t operator()(uint64_t x) const {
    uint64_t rest = x - static_cast<uint64_t>((static_cast<Wide>(x) * reciprocal) >> 64) * divisor;
    while (rest >= divisor) rest -= divisor;  // the quotient is at most 2 too small
    return rest;
  }
};

uint64_t rows_of(uint64_t size) {
  auto root = static_cast<uint64_t>(std::sqrt(static_cast<double>(size - 1)));
  while (root * root > size - 1) --root;
  while ((root + 1) * (root + 1) <= size - 1) ++root;
  return root + 1;
}

struct Source {
  uint64_t size, key;
  Modulus rows, columns;
  Source(uint64_t slices, uint64_t source_key)
      : size(slices), key(source_key), rows(rows_of(slices)), columns((slices + rows.divisor - 1) / rows.divisor) {}
};

// The round keys of the epoch that a source was last met in.
struct Epoch {
  uint64_t number = std::numeric_limits<uint64_t>::max();
  uint64_t keys[kHalfRounds] = {};
  void enter(uint64_t epoch, uint64_t source_key) {
    if (epoch == number) return;
    number = epoch;
    const uint64_t key = mix(source_key + epoch * kGolden);
    for (uint64_t half = 0; half < kHalfRounds; ++half) keys[half] = mix(key + half * kGolden);
  }
};

uint64_t permute(uint64_t index, const Source& source, const uint64_t* keys) {
  do {
    uint64_t row = index / source.columns.divisor, column = index % source.columns.divisor;
    for (int half = 0; half < kHalfRounds; half += 2) {
      row += source.rows(mix(keys[half] + column));
      if (row >= source.rows.divisor) row -= source.rows.divisor;
      column += source.columns(mix(keys[half + 1] + row));
      if (column >= source.columns.divisor) column -= source.columns.divisor;
    }
    index = row * source.columns.divisor + column;
  } while (index >= source.size);
  return index;
}

// ------------------------------------------------------------------------------------------------------------- stage

struct Split {
  int32_t left, right;
  uint64_t ratio, part;  // of 2^62
  int64_t whole;
};

struct Place {
  int32_t source;
  int64_t earlier;  // samples of the source before, in the stage
};

class Stage {
 public:
  Stage(int64_t samples, const Array<int64_t>& slices, const Array<uint64_t>& keys, const Array<int64_t>& served,
        int32_t root, const Array<int32_t>& lefts, const Array<int32_t>& rights, const Array<uint64_t>& ratios,
        const Array<int64_t>& wholes, const Array<uint64_t>& parts, const Array<int64_t>& opening_sources,
        const Array<int64_t>& opening_ordinals)
      : samples_(samples), root_(root), slices_(values(slices, "slices")), served_(values(served, "served")) {
    require(samples >= 0 && samples <= kMost, "samples must lie between 0 and 2^60");
    read_sources(values(keys, "keys"));
    read_splits(values(lefts, "lefts"), values(rights, "rights"), values(ratios, "ratios"), values(wholes, "wholes"),
                values(parts, "parts"));
    read_opening(values(opening_sources, "opening_sources"), values(opening_ordinals, "opening_ordinals"));
  }

  py::tuple samples(int64_t begin, int64_t end) const {
    if (begin < 0 || begin > end || end > samples_) throw py::index_error("samples lie outside of the stage");
    return fill(end - begin, [begin](int64_t i) { return begin + i; });
  }

  py::tuple samples_at(const Array<int64_t>& numbers) const {
    if (numbers.ndim() != 1) throw py::value_error("numbers must have one dimension");
    const int64_t* data = numbers.data();
    return fill(numbers.size(), [data](int64_t i) { return data[i]; });
  }

 private:
  void read_sources(const std::vector<uint64_t>& keys) {
    const size_t n = slices_.size();
    require(n > 0 && keys.size() == n && served_.size() == n, "slices, keys and served must be of one length, not 0");
    require(n < size_t{1} << 31, "too many sources");
    for (size_t i = 0; i < n; ++i) {
      require(slices_[i] >= 0 && slices_[i] <= kMost, "slices must lie between 0 and 2^60");
      require(served_[i] >= 0 && served_[i] <= kMost, "served must lie between 0 and 2^60");
      sources_.emplace_back(static_cast<uint64_t>(std::max<int64_t>(slices_[i], 1)), keys[i]);
    }
  }

  // A child is a split before its parent, which ends every walk, or a source that has slices.
  void read_splits(const std::vector<int32_t>& lefts, const std::vector<int32_t>& rights,
                   const std::vector<uint64_t>& ratios, const std::vector<int64_t>& wholes,
                   const std::vector<uint64_t>& parts) {
    const size_t n = lefts.size();
    require(rights.size() == n && ratios.size() == n && wholes.size() == n && parts.size() == n,
            "the columns of the splits must be of one length");
    for (size_t i = 0; i < n; ++i) {
      check_child(lefts[i], i);
      check_child(rights[i], i);
      require(ratios[i] <= uint64_t{1} << kOneBits && parts[i] < uint64_t{1} << kOneBits, "a ratio exceeds 1");
      require(wholes[i] >= -kMost && wholes[i] <= kMost, "a phase exceeds 2^60 samples");
      splits_.push_back({lefts[i], rights[i], ratios[i], parts[i], wholes[i]});
    }
    check_child(root_, n);
  }

  void check_child(int32_t child, size_t below) const {
    if (child >= 0) {
      require(static_cast<size_t>(child) < below, "a split must come after its children");
    } else {
      check_source(~child);
    }
  }

  void check_source(int64_t source) const {
    require(source >= 0 && source < static_cast<int64_t>(slices_.size()) && slices_[static_cast<size_t>(source)] > 0,
            "a source without slices is to be served");
  }

  void read_opening(const std::vector<int64_t>& sources, const std::vector<int64_t>& ordinals) {
    require(sources.size() == ordinals.size(), "an opening needs an ordinal for each source");
    for (size_t i = 0; i < sources.size(); ++i) {
      check_source(sources[i]);
      require(ordinals[i] >= 0 && ordinals[i] <= kMost, "an opening's ordinal is out of range");
      opening_.push_back({static_cast<int32_t>(sources[i]), ordinals[i]});
    }
  }

  Place place(int64_t n) const {
    if (n < static_cast<int64_t>(opening_.size())) return opening_[static_cast<size_t>(n)];
    int32_t node = root_;
    while (node >= 0) {
      const Split& split = splits_[static_cast<size_t>(node)];
      const Wide line = static_cast<Wide>(split.ratio) * static_cast<uint64_t>(n) + split.part;
      const auto now = static_cast<int64_t>(line >> kOneBits) + split.whole;
      const auto next = static_cast<int64_t>((line + split.ratio) >> kOneBits) + split.whole;
      const int64_t left = std::min(std::max<int64_t>(now, 0), n);
      const bool is_left = std::min(std::max<int64_t>(next, 0), n + 1) > left;
      node = is_left ? split.left : split.right;
      n = is_left ? left : n - left;
    }
    return {~node, n};
  }

  template <typename Number>
  py::tuple fill(int64_t size, Number number) const {
    py::array_t<int64_t> sources(size), epochs(size), offsets(size);
    int64_t *source = sources.mutable_data(), *epoch = epochs.mutable_data(), *offset = offsets.mutable_data();
    bool is_inside = true;
    {
      py::gil_scoped_release release;
      std::vector<Epoch> met(sources_.size());
      for (int64_t i = 0; i < size; ++i) {
        const int64_t n = number(i);  // once: another thread may write where it comes from
        is_inside = n >= 0 && n < samples_;
        if (!is_inside) break;
        const Place found = place(n);
        const auto from = static_cast<size_t>(found.source);
        const auto earlier = static_cast<uint64_t>(served_[from] + found.earlier);
        met[from].enter(earlier / sources_[from].size, sources_[from].key);
        source[i] = found.source;
        epoch[i] = static_cast<int64_t>(met[from].number);
        offset[i] = static_cast<int64_t>(permute(earlier % sources_[from].size, sources_[from], met[from].keys));
      }
    }
    if (!is_inside) throw py::index_error("samples lie outside of the stage");
    return py::make_tuple(sources, epochs, offsets);
  }

  int64_t samples_;
  int32_t root_;
  std::vector<int64_t> slices_, served_;
  std::vector<Source> sources_;
  std::vector<Split> splits_;
  std::vector<Place> opening_;
};

// ----------------------------------------------------------------------------------------------------------- opening

py::tuple largest_deficit_first(const Array<int64_t>& rates_array, const Array<int64_t>& deficits_array,
                                const Array<int64_t>& remaining_array, int64_t steps) {
  const auto rates = values(rates_array, "rates");
  auto deficits = values(deficits_array, "deficits");
  auto remaining = values(remaining_array, "remaining");
  const size_t m = rates.size();
  require(m > 0 && deficits.size() == m && remaining.size() == m, "three arrays of one length, at least 1, are needed");
  require(steps >= 0 && steps <= int64_t{1} << 20, "steps must lie between 0 and 2^20");
  constexpr int64_t kLowest = std::numeric_limits<int64_t>::min() / 2;
  for (size_t i = 0; i < m; ++i) {
    require(rates[i] >= 0 && rates[i] <= int64_t{1} << kDeficitBits, "rates must lie between 0 and 1");
    require(deficits[i] > kLowest && deficits[i] < -kLowest, "a deficit is out of range");
    if (remaining[i] <= 0) deficits[i] = kLowest;
  }
  py::array_t<int64_t> sources(steps), ordinals(steps);
  int64_t *source = sources.mutable_data(), *ordinal = ordinals.mutable_data();
  std::vector<int64_t> served(m, 0);
  for (int64_t n = 0; n < steps; ++n) {
    size_t best = 0;
    for (size_t i = 0; i < m; ++i) {
      deficits[i] += rates[i];
      if (deficits[i] > deficits[best]) best = i;
    }
    source[n] = static_cast<int64_t>(best);
    ordinal[n] = served[best]++;
    deficits[best] = --remaining[best] > 0 ? deficits[best] - (int64_t{1} << kDeficitBits) : kLowest;
  }
  return py::make_tuple(sources, ordinals);
}

// ------------------------------------------------------------------------------------------------------------ tokens

bool read_fully(int handle, char* to, size_t size, int64_t position) {
  while (size > 0) {
    const ssize_t got = ::pread(handle, to, size, position);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    to += got, size -= static_cast<size_t>(got), position += got;
  }
  return true;
}

// Ids as they lie in the file, widened; false where some are missing, negative or at or above the limit.
template <typename T>
bool read_as(int handle, int64_t first, int64_t count, uint64_t limit, int64_t* to) {
  using Unsigned = std::make_unsigned_t<T>;
  const auto size = static_cast<size_t>(count);
  const std::unique_ptr<T[]> ids(new T[size]);
  const auto item = static_cast<int64_t>(sizeof(T));
  if (!read_fully(handle, reinterpret_cast<char*>(ids.get()), size * sizeof(T), first * item)) return false;
  Unsigned most = 0;
  for (size_t i = 0; i < size; ++i) {
    most = std::max(most, static_cast<Unsigned>(ids[i]));  // a negative id exceeds every other
    to[i] = ids[i];
  }
  const auto beyond = static_cast<uint64_t>(std::numeric_limits<T>::max()) + 1;
  return count == 0 || most < (std::is_signed_v<T> ? std::min(limit, beyond) : limit);
}

py::object read_tokens(int handle, int64_t first, int64_t count, const std::string& kind, int64_t limit) {
  require(first >= 0 && first <= kMost && count >= 0 && count <= kMost && limit >= 0, "tokens are out of range");
  const auto read = kind == "u1"   ? read_as<uint8_t>
                    : kind == "i1" ? read_as<int8_t>
                    : kind == "i2" ? read_as<int16_t>
                    : kind == "i4" ? read_as<int32_t>
                    : kind == "i8" ? read_as<int64_t>
                    : kind == "u2" ? read_as<uint16_t>
                                   : nullptr;
  require(read != nullptr, "the type of the tokens is unknown");
  py::array_t<int64_t> tokens(count);
  int64_t* to = tokens.mutable_data();
  bool is_good = false;
  {
    py::gil_scoped_release release;
    is_good = read(handle, first, count, static_cast<uint64_t>(limit), to);
  }
  return is_good ? py::object(tokens) : py::object(py::none());
}

}  // namespace

PYBIND11_MODULE(_sampler, module) {
  module.doc() = "The data order and the reading of tokens in C++; megapoly.data.sampler and reader say what they do.";
  module.attr("INTERFACE") = kInterface;
  module.def("largest_deficit_first", &largest_deficit_first, py::arg("rates"), py::arg("deficits"),
             py::arg("remaining"), py::arg("steps"));
  module.def("read_tokens", &read_tokens, py::arg("handle"), py::arg("first"), py::arg("count"), py::arg("kind"),
             py::arg("limit"));
  py::class_<Stage>(module, "Stage")
      .def(py::init<int64_t, const Array<int64_t>&, const Array<uint64_t>&, const Array<int64_t>&, int32_t,
                    const Array<int32_t>&, const Array<int32_t>&, const Array<uint64_t>&, const Array<int64_t>&,
                    const Array<uint64_t>&, const Array<int64_t>&, const Array<int64_t>&>(),
           py::arg("samples"), py::arg("slices"), py::arg("keys"), py::arg("served"), py::arg("root"),
           py::arg("lefts"), py::arg("rights"), py::arg("ratios"), py::arg("wholes"), py::arg("parts"),
           py::arg("opening_sources"), py::arg("opening_ordinals"))
      .def("samples", &Stage::samples, py::arg("begin"), py::arg("end"))
      .def("samples_at", &Stage::samples_at, py::arg("numbers"));
}
