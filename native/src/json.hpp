// JSON as it comes from outside, read strictly: what is missing, unknown or of another kind is refused in a sentence.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "error.hpp"

namespace dnp::core {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;
using Names = std::vector<std::string>;

// The value of a JSON text. Throws Error(code), the message begun with `where`, for what is no JSON or nests deeper
// than any of ours: what walks a value may then recurse.
Json parse_json(std::string_view text, const std::string& where, Code code);

// A value of any kind, short enough for a message.
std::string shown(const Json& value);

// A clause for an unknown word: the nearest known one, or all of them.
std::string nearest(const std::string& word, const Names& known);
std::string joined(const Names& names);

// Throws settings_error unless `value` is one of `known`.
void check_choice(const std::string& name, const Json& value, const Names& known);

bool is_integer(const Json& value, std::int64_t low = std::numeric_limits<std::int64_t>::min(),
                std::int64_t high = std::numeric_limits<std::int64_t>::max());
bool is_number(const Json& value);  // finite; true and false are none

// Python's notions, by which the settings of schedulers are read: 1 equals true, and null, 0, "" and [] are false.
bool same(const Json& a, const Json& b);
bool truthy(const Json& value);

}  // namespace dnp::core
