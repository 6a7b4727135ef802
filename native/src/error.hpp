// What can go wrong, as one exception: a code for programs, a sentence for people that names the value and the remedy.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace dnp::core {

// The exit codes of the `dnp` command, and the numbers of `dnp_code` in dnp.h.
enum class Code { general = 1, settings = 2, bundle = 3, backend = 4, output = 6, cancelled = 130 };

struct Error : std::runtime_error {
    Error(Code code, const std::string& message) : std::runtime_error(message), code(code) {}
    Code code;
    std::string cause;  // what a library said, where it was one
};

// All parts in one text.
template <class... Parts>
std::string cat(const Parts&... parts) {
    std::ostringstream text;
    text.imbue(std::locale::classic());
    (text << ... << parts);
    return text.str();
}

template <class... Parts>
Error settings_error(const Parts&... parts) {
    return {Code::settings, cat(parts...)};
}

template <class... Parts>
Error bundle_error(const Parts&... parts) {
    return {Code::bundle, cat(parts...)};
}

template <class... Parts>
Error backend_error(const Parts&... parts) {
    return {Code::backend, cat(parts...)};
}

}  // namespace dnp::core
