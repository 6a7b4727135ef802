// What bundle.json holds, checked: dnp/engine/bundle/manifest.py and contract.py are the definition.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "json.hpp"

namespace dnp::core {

using Shape = std::vector<std::int64_t>;
using Sizes = std::map<std::string, std::int64_t>;  // of the symbols in shapes, by name

// An input or output of a graph. An entry of its shape is an integer, "batch" or "4*height".
struct TensorSpec {
    std::vector<Json> shape;
    std::string dtype = "float32";  // or float16, int64, uint8

    Shape resolve(const Sizes& sizes) const;
    TensorSpec at(const Sizes& fixed) const;  // with these sizes fixed
    bool operator==(const TensorSpec& other) const { return shape == other.shape && dtype == other.dtype; }
    std::string text() const;
};

using Tensors = std::map<std::string, TensorSpec>;

struct Signature {
    Tensors inputs, outputs;
};

struct Graph : Signature {
    std::string name, file;
};

struct FileRecord {
    std::uint64_t size;
    std::string sha256;
};

struct TokenizerSpec {
    std::string file;
    std::int64_t bos, eos, pad;
};

// What a pass uses where a request says nothing; guidance is w of the final pass, s of the DNS pass.
struct PassDefaults {
    std::string sampler;
    std::int64_t steps;
    double guidance;
};

struct Manifest {
    std::string name, family, precision;  // precision: fp32 or fp16
    struct {
        std::int64_t length;
        std::vector<TokenizerSpec> tokenizers;  // one for each input of encode_text
        bool empty_is_zeros;                    // ∅ is zeros, not the encoded empty string
    } text;
    struct Conditioning {
        std::vector<Json> shape;
        bool of_size;  // six numbers of the image's size; else an output of encode_text of the same name
    };
    std::map<std::string, Conditioning> conditioning;
    struct {
        std::int64_t roles;
        bool methods, embedded;
    } guidance;
    struct {
        std::int64_t channels, height, width, multiple, max_height, max_width, vae_scale_factor;
    } latents;
    Json schedule;  // the samplers' to read
    struct {
        std::int64_t image_size, length, layers, heads, head_dim, tokens, vocab, bos, eos, pad, max_length;
        std::string tokenizer;
    } caption;
    PassDefaults final, dns;
    std::map<std::string, Graph> graphs;
    std::map<std::string, FileRecord> files;

    std::vector<std::string> text_inputs() const;  // of encode_text, one for each tokenizer
};

// Checks the JSON value of a bundle.json; `where` opens each message. Throws bundle_error.
Manifest parse_manifest(const Json& data, const std::string& where);

}  // namespace dnp::core
