// Records as JSON, read strictly, as dnp/engine/bundle/schema.py does. Throws bundle_error.
#pragma once

#include <algorithm>
#include <string>

#include "json.hpp"

namespace dnp::core {

constexpr std::int64_t largest_integer = 2147483647;  // of any integer that is no number of bytes
constexpr const char* remedy = "; export the model again";

[[noreturn]] inline void refuse(const std::string& where, const char* wanted, const Json& found) {
    throw bundle_error(where, ": must be ", wanted, ", not ", shown(found), remedy);
}

// The fields of a JSON object, each read once by name; `finish` refuses those that nobody knows.
class Fields {
public:
    Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
        if (!object.is_object()) refuse(where_, "an object", object);
    }

    const Json* find(const std::string& key) {
        known_.push_back(key);
        auto found = object_.find(key);
        return found == object_.end() ? nullptr : &*found;
    }

    const Json& at(const std::string& key) {
        if (const Json* value = find(key)) return *value;
        throw bundle_error(where_, ": '", key, "' is missing", remedy);
    }

    std::string where(const std::string& key) const { return where_ + ": " + key; }

    std::int64_t integer(const std::string& key, std::int64_t low, std::int64_t high = largest_integer) {
        const Json& value = at(key);
        if (!is_integer(value, low, high)) refuse(where(key), cat("an integer from ", low).c_str(), value);
        return value.get<std::int64_t>();
    }

    double number(const std::string& key) {
        const Json& value = at(key);
        if (!is_number(value)) refuse(where(key), "a finite number", value);
        return value.get<double>();
    }

    std::string text(const std::string& key) {
        const Json& value = at(key);
        if (!value.is_string()) refuse(where(key), "text", value);
        return value.get<std::string>();
    }

    bool flag(const std::string& key) {
        const Json& value = at(key);
        if (!value.is_boolean()) refuse(where(key), "true or false", value);
        return value.get<bool>();
    }

    std::string choice(const std::string& key, const Names& choices) {
        const Json& value = at(key);
        if (!value.is_string() || std::find(choices.begin(), choices.end(), value.get<std::string>()) == choices.end())
            refuse(where(key), ("one of " + joined(choices)).c_str(), value);
        return value.get<std::string>();
    }

    void finish() const {
        for (const auto& [key, value] : object_.items())
            if (std::find(known_.begin(), known_.end(), key) == known_.end())
                throw bundle_error(where_, ": unknown key ", shown(key), ", ", nearest(key, known_), remedy);
    }

private:
    const Json& object_;
    std::string where_;
    Names known_;
};

}  // namespace dnp::core
