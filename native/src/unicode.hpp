// Text as code points, and what the `tokenizers` library takes characters for.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace dnp::core {

using Text = std::u32string;

Text decode_utf8(std::string_view bytes);  // what is no UTF-8 becomes U+FFFD
std::string encode_utf8(const Text& text);

namespace unicode {

bool is_letter(char32_t c);  // \p{L}
bool is_number(char32_t c);  // \p{N}
bool is_space(char32_t c);   // \s

bool is_bert_space(char32_t c);
bool is_bert_punctuation(char32_t c);
bool is_bert_removed(char32_t c);  // by its cleaning
bool is_bert_blank(char32_t c);    // becomes a space by its cleaning
bool is_bert_chinese(char32_t c);
bool is_nonspacing_mark(char32_t c);

bool is_python_space(char32_t c);  // str.strip() takes it away

Text lower(const Text& text);
Text nfd(const Text& text);
Text nfc(const Text& text);

}  // namespace unicode
}  // namespace dnp::core
