#include "unicode.hpp"

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace dnp::core {

namespace unicode {

namespace {

struct Range {
    char32_t first, last;
};
struct Mapping {
    char32_t from, to[4];  // as many as there are, then zeros
};
struct Composition {
    char32_t first, second, whole;
};
struct Class {
    char32_t first, last;
    std::uint8_t kind;
};

#include "generated/unicode.inc"

template <class Ranges>
auto within(const Ranges& ranges, char32_t c) -> decltype(std::begin(ranges)) {
    auto found = std::upper_bound(std::begin(ranges), std::end(ranges), c, [](char32_t value, const auto& range) { return value < range.first; });
    return found != std::begin(ranges) && c <= std::prev(found)->last ? std::prev(found) : nullptr;
}

template <std::size_t n>
void append(const Mapping (&mappings)[n], char32_t c, Text& text) {
    auto found = std::lower_bound(std::begin(mappings), std::end(mappings), c, [](const Mapping& m, char32_t value) { return m.from < value; });
    if (found == std::end(mappings) || found->from != c) {
        text += c;
        return;
    }
    for (char32_t to : found->to)
        if (to) text += to;
}

// Classes are sorted by kind, their members within it: there are some 900 of them in 400 ranges.
std::vector<Class> by_character() {
    std::vector<Class> sorted(std::begin(combining), std::end(combining));
    std::sort(sorted.begin(), sorted.end(), [](const Class& a, const Class& b) { return a.first < b.first; });
    return sorted;
}

int combining_class(char32_t c) {
    static const std::vector<Class> classes = by_character();
    if (c < 0x300) return 0;
    auto found = std::upper_bound(classes.begin(), classes.end(), c, [](char32_t value, const Class& k) { return value < k.first; });
    return found != classes.begin() && c <= std::prev(found)->last ? std::prev(found)->kind : 0;
}

// Hangul syllables: chapter 3.12 of the Unicode standard.
constexpr char32_t syllables = 0xAC00, leads = 0x1100, vowels = 0x1161, tails = 0x11A7;
constexpr char32_t lead_count = 19, vowel_count = 21, tail_count = 28, syllable_count = lead_count * vowel_count * tail_count;

char32_t compose(char32_t a, char32_t b) {  // 0 when they do not
    if (a - leads < lead_count && b - vowels < vowel_count) return syllables + ((a - leads) * vowel_count + (b - vowels)) * tail_count;
    if (a - syllables < syllable_count && (a - syllables) % tail_count == 0 && b > tails && b < tails + tail_count) return a + (b - tails);
    auto found = std::lower_bound(std::begin(composition), std::end(composition), std::pair{a, b}, [](const Composition& c, const auto& pair) {
        return std::pair{c.first, c.second} < pair;
    });
    return found != std::end(composition) && found->first == a && found->second == b ? found->whole : 0;
}

}  // namespace

bool is_letter(char32_t c) { return within(letters, c); }
bool is_number(char32_t c) { return within(numbers, c); }
bool is_space(char32_t c) { return within(spaces, c); }
bool is_bert_space(char32_t c) { return within(bert_spaces, c); }
bool is_bert_punctuation(char32_t c) { return within(bert_punctuation, c); }
bool is_bert_removed(char32_t c) { return within(bert_removed, c); }
bool is_bert_blank(char32_t c) { return within(bert_blanks, c); }
bool is_bert_chinese(char32_t c) { return within(bert_chinese, c); }
bool is_nonspacing_mark(char32_t c) { return within(nonspacing_marks, c); }

bool is_python_space(char32_t c) {
    return (c >= 9 && c <= 13) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
           c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

Text lower(const Text& text) {
    Text lowered;
    lowered.reserve(text.size());
    for (char32_t c : text) append(unicode::lower_case, c, lowered);
    return lowered;
}

Text nfd(const Text& text) {
    Text parts;
    parts.reserve(text.size());
    for (char32_t c : text) {
        if (char32_t index = c - syllables; index < syllable_count) {
            parts += leads + index / (vowel_count * tail_count);
            parts += vowels + index % (vowel_count * tail_count) / tail_count;
            if (index % tail_count) parts += tails + index % tail_count;
        } else {
            append(canonical, c, parts);
        }
    }
    for (auto mark = parts.begin(); mark != parts.end();) {  // marks in the order of their classes
        if (!combining_class(*mark)) {
            ++mark;
            continue;
        }
        auto end = std::find_if(mark, parts.end(), [](char32_t c) { return !combining_class(c); });
        std::stable_sort(mark, end, [](char32_t a, char32_t b) { return combining_class(a) < combining_class(b); });
        mark = end;
    }
    return parts;
}

Text nfc(const Text& text) {
    Text parts = nfd(text), composed;
    composed.reserve(parts.size());
    std::size_t starter = Text::npos;  // in `composed`
    int last = 0;                      // class of what stands after it
    for (char32_t c : parts) {
        int kind = combining_class(c);
        bool adjacent = starter != Text::npos && starter + 1 == composed.size();
        bool blocked = !adjacent && last >= kind;
        if (starter != Text::npos && !blocked)
            if (char32_t whole = compose(composed[starter], c)) {
                composed[starter] = whole;
                continue;
            }
        if (kind == 0) starter = composed.size();
        last = kind;
        composed += c;
    }
    return composed;
}

}  // namespace unicode

Text decode_utf8(std::string_view bytes) {
    Text text;
    text.reserve(bytes.size());
    for (std::size_t i = 0; i < bytes.size();) {
        auto lead = static_cast<unsigned char>(bytes[i]);
        std::size_t length = lead < 0x80 ? 1 : lead >= 0xC2 && lead < 0xE0 ? 2 : (lead & 0xF0) == 0xE0 ? 3 : lead >= 0xF0 && lead < 0xF5 ? 4 : 0;
        char32_t c = length == 1 ? lead : lead & (0xFF >> (length + 1));
        bool valid = length > 0 && i + length <= bytes.size();
        for (std::size_t k = 1; valid && k < length; ++k) {
            auto next = static_cast<unsigned char>(bytes[i + k]);
            valid = (next & 0xC0) == 0x80;
            c = c << 6 | (next & 0x3F);
        }
        constexpr char32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
        valid = valid && c >= least[length] && c <= 0x10FFFF && (c < 0xD800 || c > 0xDFFF);
        text += valid ? c : U'\uFFFD';
        i += valid ? length : 1;
    }
    return text;
}

std::string encode_utf8(const Text& text) {
    std::string bytes;
    bytes.reserve(text.size());
    for (char32_t c : text) {
        if (c < 0x80) {
            bytes += static_cast<char>(c);
        } else if (c < 0x800) {
            bytes += static_cast<char>(0xC0 | c >> 6);
            bytes += static_cast<char>(0x80 | (c & 0x3F));
        } else if (c < 0x10000) {
            bytes += static_cast<char>(0xE0 | c >> 12);
            bytes += static_cast<char>(0x80 | (c >> 6 & 0x3F));
            bytes += static_cast<char>(0x80 | (c & 0x3F));
        } else {
            bytes += static_cast<char>(0xF0 | c >> 18);
            bytes += static_cast<char>(0x80 | (c >> 12 & 0x3F));
            bytes += static_cast<char>(0x80 | (c >> 6 & 0x3F));
            bytes += static_cast<char>(0x80 | (c & 0x3F));
        }
    }
    return bytes;
}

}  // namespace dnp::core
