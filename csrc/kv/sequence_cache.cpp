// Over 600 lines: one class, all of whose functions work on the State that stands first.
#include "kv/sequence_cache.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "core/checked.hpp"
#include "core/error.hpp"

namespace inferos::kv {
namespace {

std::string text(std::int64_t value) { return std::to_string(value); }
std::string text(std::size_t value) { return std::to_string(value); }

constexpr std::size_t kLooseBytes = std::size_t{1} << 20;  // free places that are not worth moving a block for

struct LayerStep {
  Reservation blocks;
  ScoreReservation scores;
};

// Memory taken for the open step, and how far it is.
struct Step {
  std::int64_t tokens = 0;          // 0 = none is open
  std::size_t appended = 0;         // layers
  std::vector<LayerStep> reserved;  // per layer, or empty where nothing had to be taken
};

}  // namespace

struct SequenceCache::State {
  CacheOptions options;
  std::shared_ptr<Arena> arena;
  std::int64_t length = 0;
  Step step;
  std::uint64_t step_number = 0;
  std::size_t left_free = 0;               // bytes of free places that tidying could not get rid of
  std::vector<std::uint64_t> appended_in;  // per layer: the last step_number it appended in
  std::array<Grid, 2> grids;               // layers with sinks; sliding-window layers
  std::vector<LayerStore> layers;
  std::vector<LayerScores> scores;   // per layer, or empty without a policy
  std::vector<LayerReview> reviews;  // the same
  std::vector<LayerKeys> keys;       // per layer

  State(CacheOptions given, std::shared_ptr<Arena> memory)
      : options(std::move(given)),
        arena(std::move(memory)),
        appended_in(options.layers.size(), 0),
        grids{Grid(static_cast<std::int32_t>(options.sink_tokens)), Grid(0)},
        keys(options.layers.size()) {}

  Format narrowest(std::size_t layer) const noexcept { return narrowest_of(options, layer, keys[layer].is_safe()); }
  bool slides(std::size_t layer) const noexcept { return options.layers[layer].local_window >= 0; }
  Grid& grid(std::size_t layer) noexcept { return grids[slides(layer) ? 1 : 0]; }
  const Grid& grid(std::size_t layer) const noexcept { return grids[slides(layer) ? 1 : 0]; }
  bool has_appended(std::size_t layer) const noexcept { return step.tokens != 0 && appended_in[layer] == step_number; }
  bool is_whole() const noexcept { return step.tokens != 0 && step.appended == layers.size(); }

  void check_layer(const char* function, std::size_t layer) const {
    if (layer >= layers.size()) {
      throw Error(ErrorCode::kShape, std::string(function) + ": layer " + text(layer) + " of " + text(layers.size()));
    }
  }

  void check_no_step(const char* function) const {
    if (step.tokens != 0) {
      throw Error(ErrorCode::kSequence, std::string(function) + ": a step of " + text(step.tokens) +
                                            " tokens is open; commit it or roll it back first");
    }
  }

  // Whether a block may be demoted or evicted by the caller's own choice; checks the arguments.
  bool is_outside_window(const char* function, std::size_t layer, std::size_t head, std::size_t index) {
    check_layer(function, layer);
    check_no_step(function);
    Grid& own = grid(layer);
    if (head >= options.layers[layer].kv_heads || index >= own.size()) {
      throw Error(ErrorCode::kShape, std::string(function) + ": head " + text(head) + " of " +
                                         text(options.layers[layer].kv_heads) + ", block " + text(index) + " of " +
                                         text(own.size()));
    }
    own.update_due(length, options.recent_window);
    return index < own.due();
  }

  // Everything a step of `tokens` tokens may need, for all layers. Throws Error{kBudget} with the cache unchanged.
  std::vector<LayerStep> reserve(std::int64_t tokens, Arena& from) {
    const std::int64_t end = length + tokens;
    std::array<std::size_t, 2> fresh{};
    for (std::size_t kind = 0; kind < grids.size(); ++kind) {
      grids[kind].update_due(length, options.recent_window);
      fresh[kind] = grids[kind].prepare(end);
    }
    const bool sinks = length == 0 && options.sink_tokens > 0;
    bool behind =
        std::any_of(reviews.begin(), reviews.end(), [](const LayerReview& layer) { return layer.has_backlog(); });
    for (std::size_t i = 0; i < layers.size() && !behind; ++i) behind = layers[i].is_behind(grid(i));
    std::vector<LayerStep> reserved;
    if (!sinks && !behind && fresh[0] == 0 && fresh[1] == 0) return reserved;  // most decode steps
    reserved.reserve(layers.size());
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const std::size_t entries = fresh[slides(i) ? 1 : 0];
      std::vector<Demotion> demotions;
      LayerStep taken;
      if (!scores.empty()) {
        demotions = reviews[i].next_demotions(layers[i], length);
        reviews[i].reserve(entries);
        taken.scores = scores[i].reserve(from, entries);
      }
      taken.blocks = layers[i].reserve(from, grid(i), std::move(demotions), entries, sinks && !slides(i));
      reserved.push_back(std::move(taken));
    }
    return reserved;
  }

  // Of a block at its last level only the whole is decided about.
  void coarsen(std::size_t layer, std::size_t head, std::size_t index) noexcept {
    const LayerStore& store = layers[layer];
    if (scores.empty() || !store.holds(head, index)) return;
    if (LayerReview::level_of(store.format(head, index)) == Level::kL2) scores[layer].coarsen(grid(layer), head, index);
  }

  // Bytes that reserve() asks for; counted in an arena of its own, whose pages are never touched.
  std::size_t need(std::int64_t tokens) {
    Arena counted(0, false);
    const std::vector<LayerStep> taken = reserve(tokens, counted);
    return counted.stats().used_bytes;
  }

  // What demotion needs to be available: blocks given up free a slab of their size once they fill one, of two sizes at worst.
  std::size_t headroom() const {
    std::size_t largest = 0;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      for (const Format format : {Format::kF16, Format::kInt8}) {
        largest = std::max(largest, arena->largest_slab(kernels::block_bytes(format, options.layers[i].head_dim)));
      }
    }
    return 2 * largest;
  }

  std::vector<ReliefLayer> relief_layers() {
    std::vector<ReliefLayer> all;
    all.reserve(layers.size());
    for (std::size_t i = 0; i < layers.size(); ++i) all.push_back({layers[i], grid(i), scores[i], reviews[i]});
    return all;
  }

  // Blocks that reviews demote leave free places in slabs that others keep. Moved together where these places have become a quarter
  // of what is used, so that the moves cost less than the demotions did.
  void tidy() {
    const auto [reserved, used] = arena->occupied();
    const std::size_t free = reserved - used;
    left_free = std::min(left_free, free);
    if (free - left_free < used / 4 + kLooseBytes) return;
    compact(*arena, relief_layers());
    const auto [now_reserved, now_used] = arena->occupied();
    left_free = now_reserved - now_used;
  }

  // reserve(), after what it takes to make room for it.
  std::vector<LayerStep> make_room_for(std::int64_t tokens) {
    if (!options.policy) return reserve(tokens, *arena);
    tidy();
    if (arena->budget() == 0) return reserve(tokens, *arena);
    const std::size_t spare = headroom();
    std::optional<Relief> relief;
    bool at_its_narrowest = false;
    for (;;) {
      std::string refusal;
      try {
        std::vector<LayerStep> taken = reserve(tokens, *arena);
        if (taken.empty() || at_its_narrowest || arena->available() >= spare) {
          if (relief) relief->keep();
          return taken;
        }
      } catch (const Error& error) {
        if (error.code() != ErrorCode::kBudget) throw;
        refusal = error.what();
      }
      if (!relief) {
        relief.emplace(*arena, relief_layers(), spare, options.policy->eviction, options.policy->overflow,
                       [this, tokens] { return need(tokens); });
      }
      if (relief->narrow()) continue;
      at_its_narrowest = true;  // what is left of the budget is for the step
      if (refusal.empty() || relief->evict()) continue;
      throw Error(ErrorCode::kBudget, "begin: " + text(tokens) + " tokens behind " + text(length) +
                                          " do not fit: " + relief->tried() + "; " + refusal);
    }
  }

  void truncate(std::int64_t to) noexcept {
    for (Grid& g : grids) g.truncate(to);
    for (std::size_t i = 0; i < layers.size(); ++i) layers[i].truncate(grid(i), to);
    for (std::size_t i = 0; i < scores.size(); ++i) {
      scores[i].truncate(grid(i));
      reviews[i].truncate(grid(i));
    }
    length = to;
  }

  void set_back(std::int64_t to) noexcept {
    truncate(to);
    for (LayerScores& layer : scores) layer.set_back(to);
    for (LayerReview& layer : reviews) layer.set_back(to);
    for (LayerKeys& layer : keys) layer.set_back(to);
  }

  // A block that is packed in one layer takes no more tokens in any.
  void close_packed_ends() noexcept {
    for (std::size_t kind = 0; kind < grids.size(); ++kind) {
      Grid& g = grids[kind];
      if (g.size() == 0 || g[g.size() - 1].finished()) continue;
      for (std::size_t i = 0; i < layers.size(); ++i) {
        if (slides(i) != (kind == 1) || !layers[i].any_packed(g.size() - 1)) continue;
        g.close_last();
        break;
      }
    }
  }
};

SequenceCache::SequenceCache(CacheOptions options, std::shared_ptr<Arena> arena) {
  check(options);
  if (arena == nullptr) throw Error(ErrorCode::kConfig, "SequenceCache: no arena");
  state_ = std::make_unique<State>(std::move(options), std::move(arena));
  State& s = *state_;
  s.layers.reserve(s.options.layers.size());
  for (std::size_t i = 0; i < s.options.layers.size(); ++i) {
    s.layers.emplace_back(s.options.layers[i], leaving(s.options, i, false, 0),
                          s.slides(i) ? 0 : s.options.sink_tokens);
    if (!s.options.policy) continue;
    const std::size_t phase = i * static_cast<std::size_t>(kReviewInterval) / s.options.layers.size();
    s.scores.emplace_back(s.options.layers[i], s.options.policy->gamma, s.narrowest(i) != Format::kF16,
                          s.options.policy->external);
    s.reviews.emplace_back(s.options.layers[i].kv_heads, s.options.policy->thresholds, s.narrowest(i),
                           max_level(s.options, i) == Level::kL3, static_cast<std::int64_t>(phase));
  }
}

SequenceCache::~SequenceCache() = default;

const CacheOptions& SequenceCache::options() const noexcept { return state_->options; }
std::int64_t SequenceCache::length() const noexcept { return state_->length; }
std::int64_t SequenceCache::pending() const noexcept { return state_->step.tokens; }

std::int64_t SequenceCache::kept_from() const noexcept {
  std::int64_t from = 0;
  for (const LayerStore& layer : state_->layers) {
    if (layer.first() > 0) from = std::max<std::int64_t>(from, state_->grids[1][layer.first()].start);
  }
  return from;
}

std::int64_t SequenceCache::rewind_floor() const noexcept {
  std::int64_t floor = 0;
  for (std::size_t i = 0; i < state_->layers.size(); ++i) {
    const LayerStore& layer = state_->layers[i];
    floor = std::max(floor, layer.evicted_end(state_->grid(i)));
    if (layer.first() == 0) continue;
    floor = std::max(floor, std::int64_t{state_->grids[1][layer.first()].start} + layer.shape().local_window);
  }
  return floor;
}

void SequenceCache::enter(std::size_t layer, std::int64_t past, std::int64_t tokens) {
  State& s = *state_;
  s.check_layer("enter", layer);
  const Step& step = s.step;
  const bool joins = step.tokens != 0 && step.appended != 0 && !s.has_appended(layer);
  if (joins) {
    if (past == s.length && tokens == step.tokens) return;
    throw Error(ErrorCode::kSequence, "enter: layer " + text(layer) + " has past " + text(past) + " and " +
                                          text(tokens) + " tokens, but the open step has past " + text(s.length) +
                                          " and " + text(step.tokens) + " tokens");
  }
  if (s.is_whole() && past > s.length && past <= s.length + step.tokens) commit();
  if (past < 0 || past > s.length) {
    throw Error(ErrorCode::kSequence, "enter: past " + text(past) + " leaves a gap: " + text(s.length) +
                                          " tokens are cached" + (step.tokens != 0 ? " and a step is not whole" : ""));
  }
  if (past < s.length) rewind(past);
  begin(tokens);
}

void SequenceCache::begin(std::int64_t tokens) {
  State& s = *state_;
  rollback();
  const std::int64_t room = static_cast<std::int64_t>(s.options.max_tokens) - s.length;
  if (tokens < 1 || tokens > room) {
    throw Error(ErrorCode::kShape, "begin: " + text(tokens) + " tokens behind " + text(s.length) +
                                       " is not within 1.." + text(room) + " (max_tokens " +
                                       text(s.options.max_tokens) + ")");
  }
  for (std::size_t i = 0; i < s.reviews.size(); ++i) {
    s.layers[i].set_leaving(leaving(s.options, i, s.keys[i].is_safe(), tokens));
  }
  s.step.reserved = s.make_room_for(tokens);
  s.step.tokens = tokens;
  s.step.appended = 0;
  s.step_number += 1;
  for (Grid& grid : s.grids) grid.extend(s.length + tokens);
}

void SequenceCache::append(std::size_t layer, const float* k, const float* v, Executor& executor) {
  State& s = *state_;
  s.check_layer("append", layer);
  if (s.step.tokens == 0) throw Error(ErrorCode::kSequence, "append: layer " + text(layer) + ": no step is open");
  if (s.has_appended(layer)) {
    throw Error(ErrorCode::kSequence, "append: layer " + text(layer) + " has already appended in this step");
  }
  LayerStep nothing;
  LayerStep& taken = s.step.reserved.empty() ? nothing : s.step.reserved[layer];
  const std::size_t settled = s.layers[layer].settled();
  s.layers[layer].append(s.grid(layer), taken.blocks, s.length, s.length + s.step.tokens, k, v, executor);
  if (!s.step.reserved.empty() && !s.scores.empty()) {
    s.reviews[layer].demoted(s.length);
    s.reviews[layer].place(taken.scores.tokens.size() / s.options.layers[layer].kv_heads);
    s.scores[layer].place(taken.scores);
    for (const Demotion& demotion : taken.blocks.demotions) s.coarsen(layer, demotion.head, demotion.index);
    for (std::size_t index = settled; index < s.layers[layer].settled(); ++index) {
      for (std::size_t head = 0; head < s.options.layers[layer].kv_heads; ++head) s.coarsen(layer, head, index);
    }
  }
  if (!s.scores.empty()) s.scores[layer].write(s.grid(layer), s.length, s.length + s.step.tokens, v);
  s.appended_in[layer] = s.step_number;
  s.step.appended += 1;
}

void SequenceCache::commit() {
  State& s = *state_;
  if (!s.is_whole()) {
    throw Error(ErrorCode::kSequence, s.step.tokens == 0 ? std::string("commit: no step is open")
                                                         : "commit: " + text(s.step.appended) + " of " +
                                                               text(s.layers.size()) + " layers have appended");
  }
  s.length += s.step.tokens;
  const bool decoded = s.step.tokens == 1;  // during prefill no block goes below what it became on leaving the window
  s.step = Step{};
  for (std::size_t i = 0; i < s.layers.size(); ++i) {
    if (s.slides(i)) {
      s.layers[i].forget_before(s.grids[1], s.length - s.options.layers[i].local_window - kRewindReserve);
    }
    if (s.scores.empty()) continue;
    s.scores[i].forget_before(s.layers[i].first());
    s.reviews[i].forget_before(s.layers[i].first());
    if (decoded) s.reviews[i].review(s.grid(i), s.layers[i], s.scores[i], s.length);
  }
}

void SequenceCache::rollback() noexcept {
  State& s = *state_;
  if (s.step.tokens == 0) return;
  s.step = Step{};
  s.truncate(s.length);
}

bool SequenceCache::wants_mass(std::size_t layer) const {
  const State& s = *state_;
  s.check_layer("wants_mass", layer);
  return !s.scores.empty() && s.has_appended(layer) &&
         s.scores[layer].wants_mass(s.grid(layer), s.length + s.step.tokens);
}

void SequenceCache::fold_mass(std::size_t layer, std::size_t head, std::span<const float> mass) noexcept {
  const State& s = *state_;
  s.scores[layer].fold(s.grid(layer), head, mass);
}

void SequenceCache::mass_folded(std::size_t layer) noexcept {
  State& s = *state_;
  s.scores[layer].folded(s.grid(layer), s.length + s.step.tokens);
}

double SequenceCache::mass_at(std::size_t layer, std::size_t head, std::int64_t position) const {
  const State& s = *state_;
  s.check_layer("mass_at", layer);
  return s.scores.empty() ? -1.0 : s.scores[layer].mass(s.grid(layer), head, s.grid(layer).find(position));
}

double SequenceCache::score(std::size_t layer, std::size_t head, std::size_t index) const {
  const State& s = *state_;
  s.check_layer("score", layer);
  if (head >= s.options.layers[layer].kv_heads || index >= s.grid(layer).size()) {
    throw Error(ErrorCode::kShape,
                "score: head " + text(head) + ", block " + text(index) + " of " + text(s.grid(layer).size()));
  }
  return s.scores.empty() ? std::numeric_limits<double>::quiet_NaN()
                          : s.scores[layer].score(s.grid(layer), head, index);
}

bool SequenceCache::wants_key_check(std::size_t layer) const {
  const State& s = *state_;
  s.check_layer("wants_key_check", layer);
  if (!s.options.policy || !s.options.policy->check_keys || s.options.formats[layer] != Format::kInt4) return false;
  const Grid& grid = s.grid(layer);
  return s.has_appended(layer) && grid.size() != 0 && grid[0].finished() &&
         s.keys[layer].is_due(s.length + s.step.tokens, s.step.tokens);
}

void SequenceCache::keys_checked(std::size_t layer, const KeyError& error) noexcept {
  State& s = *state_;
  s.keys[layer].checked(s.length + s.step.tokens, error);
  s.reviews[layer].set_limits(s.narrowest(layer), max_level(s.options, layer) == Level::kL3);
}

Format SequenceCache::narrowest(std::size_t layer) const {
  state_->check_layer("narrowest", layer);
  return state_->narrowest(layer);
}

void SequenceCache::set_policy(Policy policy, std::vector<Format> formats, std::size_t recent_window) {
  State& s = *state_;
  s.check_no_step("set_policy");
  if (!s.options.policy) throw Error(ErrorCode::kConfig, "set_policy: only an auto cache goes by a policy");
  CacheOptions changed = s.options;
  changed.policy = std::move(policy);
  changed.formats = std::move(formats);
  changed.recent_window = recent_window;
  check(changed);
  if (changed.policy->external != s.options.policy->external) {
    throw Error(ErrorCode::kConfig, "set_policy: the scorer of a cache does not change");
  }
  const double gamma = changed.policy->gamma;
  const Thresholds thresholds = changed.policy->thresholds;
  s.options = std::move(changed);  // nothing below can fail
  for (std::size_t i = 0; i < s.layers.size(); ++i) {
    s.scores[i].set_gamma(gamma);
    s.scores[i].set_wanted(s.narrowest(i) != Format::kF16);
    s.reviews[i].set_thresholds(thresholds);
    s.reviews[i].set_limits(s.narrowest(i), max_level(s.options, i) == Level::kL3);
  }
}

void SequenceCache::set_scores(std::size_t layer, std::span<const double> scores) {
  State& s = *state_;
  s.check_layer("set_scores", layer);
  s.check_no_step("set_scores");
  if (!s.options.policy || !s.options.policy->external) {
    throw Error(ErrorCode::kConfig, "set_scores: only an auto cache with the external scorer takes scores");
  }
  const std::size_t blocks = s.grid(layer).size();
  if (scores.size() != blocks * s.options.layers[layer].kv_heads) {
    throw Error(ErrorCode::kShape, "set_scores: " + text(scores.size()) + " scores for " + text(blocks) +
                                       " blocks of " + text(s.options.layers[layer].kv_heads) + " kv heads");
  }
  s.scores[layer].set_external(scores, blocks);
}

bool SequenceCache::review_due(std::size_t layer) const {
  const State& s = *state_;
  s.check_layer("review_due", layer);
  return !s.reviews.empty() && s.reviews[layer].is_due(s.length + 1);
}

TokenStatistics SequenceCache::token_statistics(std::size_t layer, std::size_t head) const {
  const State& s = *state_;
  s.check_layer("token_statistics", layer);
  if (head >= s.options.layers[layer].kv_heads) {
    throw Error(ErrorCode::kShape,
                "token_statistics: head " + text(head) + " of " + text(s.options.layers[layer].kv_heads));
  }
  const LayerScores* scores = s.scores.empty() ? nullptr : &s.scores[layer];
  return kv::token_statistics(s.layers[layer], scores, s.grid(layer), head, s.length);
}

std::pair<std::int64_t, std::int64_t> SequenceCache::block_span(std::size_t layer, std::size_t index) const {
  state_->check_layer("block_span", layer);
  const GridEntry& entry = state_->grid(layer)[index];
  return {entry.start, entry.end()};
}

std::array<DemotionError, kernels::kFormats> SequenceCache::demotion_errors() const {
  std::array<DemotionError, kernels::kFormats> total{};
  for (const LayerStore& layer : state_->layers) layer.add_errors(total);
  return total;
}

std::span<const HeadStreams> SequenceCache::streams(std::size_t layer) const {
  state_->check_layer("streams", layer);
  return state_->layers[layer].streams();
}

std::int64_t SequenceCache::visible_length(std::size_t layer) const {
  state_->check_layer("visible_length", layer);
  return state_->length + (state_->has_appended(layer) ? state_->step.tokens : 0);
}

void SequenceCache::rewind(std::int64_t length) {
  State& s = *state_;
  if (length < 0 || length > s.length || (length != 0 && length < rewind_floor())) {
    throw Error(ErrorCode::kRewind, "rewind: length " + text(length) + " is not within " + text(rewind_floor()) + ".." +
                                        text(s.length) + (rewind_floor() > 0 ? ", nor 0" : ""));
  }
  rollback();
  if (length == s.length) return;
  s.set_back(length);
  s.close_packed_ends();
}

void SequenceCache::clear() {
  rollback();
  state_->set_back(0);
}

std::unique_ptr<SequenceCache> SequenceCache::fork() const {
  const State& s = *state_;
  s.check_no_step("fork");
  auto copy = std::make_unique<SequenceCache>(s.options, s.arena);
  State& c = *copy->state_;
  c.length = s.length;
  c.grids = s.grids;
  for (std::size_t i = 0; i < s.layers.size(); ++i) c.layers[i] = s.layers[i].fork(*s.arena);
  for (std::size_t i = 0; i < s.scores.size(); ++i) c.scores[i] = s.scores[i].fork(*s.arena);
  for (std::size_t i = 0; i < s.reviews.size(); ++i) c.reviews[i] = s.reviews[i].fork();
  c.keys = s.keys;
  return copy;
}

bool SequenceCache::demote(std::size_t layer, std::size_t head, std::size_t index, Format format) {
  State& s = *state_;
  if (!s.is_outside_window("demote", layer, head, index)) return false;
  if (!s.layers[layer].demote(*s.arena, s.grid(layer), head, index, format)) return false;
  s.coarsen(layer, head, index);
  return true;
}

bool SequenceCache::evict(std::size_t layer, std::size_t head, std::size_t index) {
  State& s = *state_;
  if (!s.is_outside_window("evict", layer, head, index)) return false;
  const double mass = s.scores.empty() ? -1.0 : s.scores[layer].mass(s.grid(layer), head, index);
  if (s.layers[layer].evict(s.grid(layer), head, index) == nullptr) return false;
  if (s.scores.empty()) return true;
  s.scores[layer].evicted(head, index);
  s.reviews[layer].evicted(head, index, mass < 0.0 ? std::numeric_limits<double>::quiet_NaN() : mass);
  return true;
}

double SequenceCache::evicted_mass() const {
  const State& s = *state_;
  double largest = 0.0;
  for (std::size_t i = 0; i < s.layers.size(); ++i) {
    if (s.reviews.empty()) {
      if (s.layers[i].evicted_end(s.grid(i)) != 0) return std::numeric_limits<double>::quiet_NaN();
      continue;
    }
    for (std::size_t head = 0; head < s.options.layers[i].kv_heads; ++head) {
      const double mass = s.reviews[i].evicted_mass(head);
      if (std::isnan(mass)) return mass;
      largest = std::max(largest, mass);
    }
  }
  return largest;
}

std::size_t SequenceCache::grid_blocks(std::size_t layer) const {
  state_->check_layer("grid_blocks", layer);
  return state_->grid(layer).size();
}

void SequenceCache::read(std::size_t layer, std::size_t head, std::int64_t position, float* k, float* v,
                         Format* format) const {
  const State& s = *state_;
  s.check_layer("read", layer);
  const LayerStore& store = s.layers[layer];
  const std::int64_t from = store.first() == 0 ? 0 : s.grids[1][store.first()].start;
  if (head >= store.shape().kv_heads || position < from || position >= s.length) {
    throw Error(ErrorCode::kShape, "read: head " + text(head) + " of " + text(store.shape().kv_heads) + ", position " +
                                       text(position) + " of " + text(from) + ".." + text(s.length - 1));
  }
  const bool in_sink = position < static_cast<std::int64_t>(store.sink_tokens());
  if (!in_sink && !store.holds(head, s.grid(layer).find(position))) {
    throw Error(ErrorCode::kShape, "read: position " + text(position) + " of layer " + text(layer) + ", head " +
                                       text(head) + " was evicted");
  }
  store.read(s.grid(layer), head, position, k, v, format);
}

TierBytes SequenceCache::tier_bytes() const {
  TierBytes total{};
  for (std::size_t i = 0; i < state_->layers.size(); ++i) state_->layers[i].count(state_->grid(i), total);
  const auto add = [&](const std::vector<BlockPtr>& blocks) {
    for (const BlockPtr& block : blocks) {
      if (block == nullptr) continue;  // already placed
      total.blocks[static_cast<std::size_t>(block->format())] += 1;
      total.bytes[static_cast<std::size_t>(block->format())] += block->bytes();
    }
  };
  for (const LayerStep& taken : state_->step.reserved) {
    for (const auto& packed : taken.blocks.packed) add(packed);
    add(taken.blocks.sinks);
    for (const auto& fresh : taken.blocks.fresh) add(fresh);
    for (const Demotion& demotion : taken.blocks.demotions) add({demotion.block});
    for (const auto* records : {&taken.scores.tokens, &taken.scores.wholes}) {
      for (const ScoreRecord& record : *records) total.score_bytes += record ? ScoreRecord::kBytes : 0;
    }
  }
  for (const LayerScores& layer : state_->scores) total.score_bytes += layer.bytes();
  return total;
}

}  // namespace inferos::kv
