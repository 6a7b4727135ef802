#include "manifest.hpp"

#include <algorithm>

#include "generated/constants.hpp"
#include "schema.hpp"
#include "version.hpp"

namespace dnp::core {

namespace {

struct Entry {
    std::int64_t factor;
    std::string symbol;
};

// "height" or "4*height"; nothing for other texts.
std::optional<Entry> parse_entry(const std::string& text) {
    auto digit = [](char c) { return c >= '0' && c <= '9'; };
    auto letter = [](char c) { return (c >= 'a' && c <= 'z') || c == '_'; };
    std::size_t star = text.find('*');
    std::int64_t factor = 1;
    if (star != std::string::npos) {
        if (star < 1 || star > 9 || text[0] == '0' || !std::all_of(text.begin(), text.begin() + star, digit)) return {};
        factor = std::stoll(text.substr(0, star));
    }
    std::string symbol = star == std::string::npos ? text : text.substr(star + 1);
    if (symbol.empty() || !letter(symbol[0])) return {};
    if (!std::all_of(symbol.begin(), symbol.end(), [&](char c) { return digit(c) || letter(c); })) return {};
    return Entry{factor, symbol};
}

std::vector<Json> shape_of(const Json& value, const std::string& where) {
    const char* wanted = "a shape such as [\"batch\", 4, \"4*height\"]";
    if (!value.is_array()) refuse(where, wanted, value);
    for (const Json& entry : value)
        if (entry.is_string() ? !parse_entry(entry.get<std::string>()) : !is_integer(entry, 1, largest_integer)) refuse(where, wanted, value);
    return value.get<std::vector<Json>>();
}

Tensors tensors_of(const Json& value, const std::string& where) {
    Tensors tensors;
    if (!value.is_object()) refuse(where, "an object", value);
    for (const auto& [name, entry] : value.items()) {
        Fields fields(entry, where + "." + name);
        TensorSpec spec{shape_of(fields.at("shape"), fields.where("shape"))};
        if (fields.find("dtype")) spec.dtype = fields.choice("dtype", {"float32", "float16", "int64", "uint8"});
        fields.finish();
        tensors[name] = std::move(spec);
    }
    return tensors;
}

void check_measured(Fields& fields) {  // what the export measured is not used here, but has to be well formed
    if (const Json* parity = fields.find("parity")) {
        if (!parity->is_object()) refuse(fields.where("parity"), "an object", *parity);
        for (const auto& [name, entry] : parity->items()) {
            Fields of(entry, fields.where("parity." + name));
            of.number("max_abs_error"), of.number("bound");
            of.finish();
        }
    }
    if (const Json* ranges = fields.find("ranges")) {
        Fields of(*ranges, fields.where("ranges"));
        of.number("largest"), of.text("at"), of.number("limit"), of.number("error");
        if (of.find("precision")) of.choice("precision", {"fp16", "fp32"});
        if (const Json* names = of.find("float32"))
            if (!names->is_array() || !std::all_of(names->begin(), names->end(), [](const Json& n) { return n.is_string(); }))
                refuse(of.where("float32"), "a list of names", *names);
        of.finish();
    }
}

PassDefaults pass_defaults(const Json& value, const std::string& where) {
    Fields fields(value, where);
    PassDefaults found{fields.text("sampler"), fields.integer("steps", 1), fields.number("guidance")};
    fields.finish();
    return found;
}

void check_schema(const Json& data, const std::string& where) {
    if (!data.is_object()) throw bundle_error(where, ": not a manifest but ", shown(data), remedy);
    Json schema = data.value("schema", Json());
    if (!schema.is_number_integer() || is_integer(schema, std::numeric_limits<std::int64_t>::min(), 0))
        throw bundle_error(where, ": no bundle manifest, its 'schema' is ", shown(schema), remedy);
    if (!is_integer(schema, 1, schema_version))
        throw bundle_error(where, ": written in schema ", shown(schema), ", and libdnp ", version, " reads up to schema ", schema_version,
                           "; use a libdnp of the dnp-engine that wrote it, or export the model again with this one");
    if (schema != schema_version)
        throw bundle_error(where, ": written in schema ", shown(schema), ", by an earlier dnp-engine; this one reads schema ", schema_version,
                           ": export the model anew, dnp export SOURCE OUT --captioner BLIP");
}

// Inputs and outputs of each of the five graphs, for a model of these sizes.
std::map<std::string, Signature> signatures(const Manifest& m) {
    auto spec = [](std::vector<Json> shape, const char* dtype = "float32") { return TensorSpec{std::move(shape), dtype}; };
    const char* half = m.precision == "fp16" ? "float16" : "float32";
    auto cache = [&](const char* entries, std::int64_t positions) {
        return spec({entries, m.caption.layers, m.caption.heads, positions, m.caption.head_dim}, half);
    };
    auto scaled = [&](const char* symbol) {
        std::int64_t factor = m.latents.vae_scale_factor;
        return factor == 1 ? std::string(symbol) : cat(factor, "*", symbol);
    };
    auto before = [](std::vector<Json> leading, const std::vector<Json>& shape) {
        leading.insert(leading.end(), shape.begin(), shape.end());
        return leading;
    };
    std::int64_t channels = m.latents.channels, roles = m.guidance.roles, size = m.caption.image_size;
    std::map<std::string, Signature> all;

    Signature& text = all["encode_text"];
    for (const auto& name : m.text_inputs()) text.inputs[name] = spec({"batch", "tokens"}, "int64");
    for (const auto& [name, entry] : m.conditioning)
        if (!entry.of_size) text.outputs[name] = spec(before({"batch"}, entry.shape));

    TensorSpec latents = spec({"places", channels, "height", "width"});
    TensorSpec state = spec({"places", column::slots, channels, "height", "width"}), index = spec({"places"}, "int64");
    TensorSpec row = spec({"rows"}, "int64");
    all["denoise"] = {{{"state", state},
                       {"index", index},
                       {"table", spec({"places", "steps", column::count})},
                       {"noise", spec({"places", "noise_steps", channels, "height", "width"})},
                       {"row_place", row},
                       {"row_role", row},
                       {"place_rows", spec({"places", roles}, "int64")}},
                      {{"next_state", state}, {"next_index", index}, {"latents", latents}, {"clean_latents", latents}}};
    for (const auto& [name, entry] : m.conditioning) all["denoise"].inputs[name] = spec(before({"places", roles}, entry.shape));

    all["decode_latents"] = {{{"latents", latents}, {"decoded", spec({"batch"}, "int64")}},
                             {{"image", spec({"batch", scaled("height"), scaled("width"), 3}, "uint8")}}};

    TensorSpec cross = cache("batch", m.caption.tokens);
    all["encode_image"] = {{{"image", spec({"batch", "image_height", "image_width", 3}, "uint8")},
                            {"resize_columns", spec({"image_width", size})},
                            {"resize_rows", spec({size, "image_height"})}},
                           {{"cross_keys", cross}, {"cross_values", cross}}};

    TensorSpec number = spec({"sequences"}, "int64"), tokens = spec({"sequences", m.caption.length}, "int64");
    TensorSpec own = cache("sequences", m.caption.length), seen = cache("images", m.caption.tokens);
    all["caption_step"] = {{{"tokens", tokens},
                            {"position", number},
                            {"prompt_length", number},
                            {"min_length", number},
                            {"parent", number},
                            {"keys", own},
                            {"values", own},
                            {"cross_keys", seen},
                            {"cross_values", seen}},
                           {{"logits", spec({"sequences", m.caption.vocab})},
                            {"next_tokens", tokens},
                            {"next_position", number},
                            {"next_keys", own},
                            {"next_values", own}}};
    return all;
}

template <class Found, class Wanted>
void same_names(const Found& found, const Wanted& wanted, const std::string& where) {
    Names known;
    for (const auto& [name, value] : wanted) known.push_back(name);
    for (const auto& [name, value] : found)
        if (!wanted.count(name)) throw bundle_error(where, ": unknown key '", name, "', ", nearest(name, known), remedy);
    for (const auto& name : known)
        if (!found.count(name)) throw bundle_error(where, ": '", name, "' is missing", remedy);
}

void check_graphs(const Manifest& m, const std::string& where) {
    auto expected = signatures(m);
    same_names(m.graphs, expected, where + ": graphs");
    for (const auto& [name, signature] : expected) {
        const Graph& graph = m.graphs.at(name);
        auto compare = [&, name = name](const Tensors& found, const Tensors& wanted, const char* side) {
            std::string place = where + ": graphs." + name + "." + side;
            same_names(found, wanted, place);
            for (const auto& [tensor, spec] : wanted)
                if (!(found.at(tensor) == spec))
                    throw bundle_error(place, ".", tensor, " is ", found.at(tensor).text(), " and must be ", spec.text(), remedy);
        };
        compare(graph.inputs, signature.inputs, "inputs");
        compare(graph.outputs, signature.outputs, "outputs");
    }
}

void check_numbers(const Manifest& m, const std::string& where) {
    auto side = [&](const char* name, std::int64_t size, std::int64_t most) {
        if (size > most || size % m.latents.multiple)
            throw bundle_error(where, ": latents.", name, " is ", size, "; it must be a multiple of ", m.latents.multiple, " and at most ", most,
                               " (latents.max_", name, ")", remedy);
    };
    side("height", m.latents.height, m.latents.max_height);
    side("width", m.latents.width, m.latents.max_width);
    if (m.caption.max_length > m.caption.length)
        throw bundle_error(where, ": caption.max_length is ", m.caption.max_length, ", but the cache holds ", m.caption.length, remedy);
    for (auto [key, id] : {std::pair{"bos", m.caption.bos}, {"eos", m.caption.eos}, {"pad", m.caption.pad}})
        if (id >= m.caption.vocab)
            throw bundle_error(where, ": caption.", key, " is outside the vocabulary of ", m.caption.vocab, remedy);
    for (const auto& [name, file] : m.files) {
        auto hexadecimal = [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); };
        if (file.sha256.size() != 64 || !std::all_of(file.sha256.begin(), file.sha256.end(), hexadecimal))
            throw bundle_error(where, ": files.'", name, "'.sha256 is no hash: ", shown(file.sha256), remedy);
    }
}

}  // namespace

Shape TensorSpec::resolve(const Sizes& sizes) const {
    Shape resolved;
    for (const Json& entry : shape) {
        if (!entry.is_string()) {
            resolved.push_back(entry.get<std::int64_t>());
            continue;
        }
        auto [factor, symbol] = *parse_entry(entry.get<std::string>());
        auto size = sizes.find(symbol);
        if (size == sizes.end()) throw settings_error("the size '", symbol, "' is not given, which the shape entry ", shown(entry), " needs");
        resolved.push_back(factor * size->second);
    }
    return resolved;
}

TensorSpec TensorSpec::at(const Sizes& fixed) const {
    TensorSpec found = *this;
    for (Json& entry : found.shape)
        if (entry.is_string())
            if (auto [factor, symbol] = *parse_entry(entry.get<std::string>()); fixed.count(symbol)) entry = factor * fixed.at(symbol);
    return found;
}

std::string TensorSpec::text() const { return dtype + " " + Json(shape).dump(); }

std::vector<std::string> Manifest::text_inputs() const {
    std::vector<std::string> names{"ids"};
    for (std::size_t number = 2; number <= text.tokenizers.size(); ++number) names.push_back(cat("ids_", number));
    return names;
}

Manifest parse_manifest(const Json& data, const std::string& where) {
    check_schema(data, where);
    Manifest m;
    Fields fields(data, where);
    fields.at("schema");
    m.name = fields.text("name"), m.family = fields.text("family");
    m.precision = fields.choice("precision", {"fp32", "fp16"});
    const Json& created = fields.at("created_with");
    if (!created.is_object()) refuse(fields.where("created_with"), "an object", created);
    for (const auto& [name, value] : created.items())
        if (!value.is_string()) refuse(fields.where("created_with." + name), "text", value);

    Fields text(fields.at("text"), fields.where("text"));
    m.text.length = text.integer("length", 1);
    const Json& tokenizers = text.at("tokenizers");
    if (!tokenizers.is_array()) refuse(text.where("tokenizers"), "a list of objects", tokenizers);
    for (const Json& entry : tokenizers) {
        Fields of(entry, text.where("tokenizers"));
        m.text.tokenizers.push_back({of.text("file"), of.integer("bos", 0), of.integer("eos", 0), of.integer("pad", 0)});
        of.finish();
    }
    m.text.empty_is_zeros = text.choice("empty", {"encoded", "zeros"}) == "zeros";
    text.finish();

    const Json& conditioning = fields.at("conditioning");
    if (!conditioning.is_object()) refuse(fields.where("conditioning"), "an object", conditioning);
    for (const auto& [name, entry] : conditioning.items()) {
        Fields of(entry, fields.where("conditioning." + name));
        auto shape = shape_of(of.at("shape"), of.where("shape"));
        m.conditioning[name] = {shape, of.choice("source", {"text", "size"}) == "size"};
        of.finish();
    }

    Fields guidance(fields.at("guidance"), fields.where("guidance"));
    m.guidance = {guidance.integer("roles", 2, 3), guidance.flag("methods"), guidance.flag("embedded")};
    guidance.finish();

    Fields latents(fields.at("latents"), fields.where("latents"));
    auto size = [](Fields& of, const char* key) { return of.integer(key, 1); };
    m.latents = {size(latents, "channels"),   size(latents, "height"),    size(latents, "width"),           size(latents, "multiple"),
                 size(latents, "max_height"), size(latents, "max_width"), size(latents, "vae_scale_factor")};
    latents.finish();

    m.schedule = fields.at("schedule");
    if (!m.schedule.is_object()) refuse(fields.where("schedule"), "an object", m.schedule);

    Fields caption(fields.at("caption"), fields.where("caption"));
    m.caption = {size(caption, "image_size"), size(caption, "length"),       size(caption, "layers"),
                 size(caption, "heads"),      size(caption, "head_dim"),     size(caption, "tokens"),
                 size(caption, "vocab"),      caption.integer("bos", 0),     caption.integer("eos", 0),
                 caption.integer("pad", 0),   caption.integer("max_length", 2), caption.text("tokenizer")};
    caption.finish();

    Fields defaults(fields.at("defaults"), fields.where("defaults"));
    m.final = pass_defaults(defaults.at("final"), defaults.where("final"));
    m.dns = pass_defaults(defaults.at("dns"), defaults.where("dns"));
    defaults.finish();

    const Json& graphs = fields.at("graphs");
    if (!graphs.is_object()) refuse(fields.where("graphs"), "an object", graphs);
    for (const auto& [name, entry] : graphs.items()) {
        Fields of(entry, fields.where("graphs." + name));
        Graph graph;
        graph.name = name, graph.file = of.text("file");
        graph.inputs = tensors_of(of.at("inputs"), of.where("inputs"));
        graph.outputs = tensors_of(of.at("outputs"), of.where("outputs"));
        check_measured(of);
        of.finish();
        m.graphs[name] = std::move(graph);
    }

    const Json& files = fields.at("files");
    if (!files.is_object()) refuse(fields.where("files"), "an object", files);
    for (const auto& [name, entry] : files.items()) {
        Fields of(entry, fields.where("files." + name));
        auto bytes = of.integer("size", 0, std::numeric_limits<std::int64_t>::max());
        m.files[name] = {static_cast<std::uint64_t>(bytes), of.text("sha256")};
        of.finish();
    }
    fields.finish();

    auto listed = [&](const std::string& key, const std::string& file) {
        if (!m.files.count(file)) throw bundle_error(where, ": ", key, " names ", shown(file), ", which 'files' does not list", remedy);
    };
    for (const auto& [name, graph] : m.graphs) listed("graphs." + name + ".file", graph.file);
    for (const auto& tokenizer : m.text.tokenizers) listed("text.tokenizers", tokenizer.file);
    listed("caption.tokenizer", m.caption.tokenizer);
    check_numbers(m, where);
    check_graphs(m, where);
    return m;
}

}  // namespace dnp::core
