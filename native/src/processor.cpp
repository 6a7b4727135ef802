#include "processor.hpp"

#include <sched.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#include "error.hpp"

namespace dnp::core {

namespace {

std::string first_line_of(const std::string& path) {
    std::ifstream file(path);
    std::string text;
    std::getline(file, text);
    return text;
}

// What /proc/cpuinfo says first of one of these names; empty when it does not.
std::string cpuinfo(std::initializer_list<const char*> names) {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
        std::size_t colon = line.find(':'), end = line.find_last_not_of(" \t", colon == std::string::npos ? 0 : colon - 1);
        if (colon == std::string::npos || std::find(names.begin(), names.end(), line.substr(0, end + 1)) == names.end()) continue;
        std::size_t first = line.find_first_not_of(" \t", colon + 1), last = line.find_last_not_of(" \t");
        if (first != std::string::npos) return line.substr(first, last + 1 - first);
    }
    return "";
}

bool is_vector_unit(const std::string& name) {
    auto begins = [&](const char* word) { return name.rfind(word, 0) == 0; };
    auto of_word = [](unsigned char c) { return std::isalnum(c) || c == '_'; };
    if (begins("sme")) return name.size() == 3 || (name.size() == 4 && std::isdigit(static_cast<unsigned char>(name[3])));
    static constexpr const char* families[] = {"avx", "amx", "fma", "f16c", "asimd", "sve", "i8mm", "bf16"};
    return std::any_of(std::begin(families), std::end(families), begins) && std::all_of(name.begin(), name.end(), of_word);
}

}  // namespace

int core_count() {
    cpu_set_t set;
    CPU_ZERO(&set);
    std::set<std::string> cores;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
            if (CPU_ISSET(cpu, &set)) {
                std::string siblings = first_line_of(cat("/sys/devices/system/cpu/cpu", cpu, "/topology/thread_siblings_list"));
                cores.insert(siblings.empty() ? std::to_string(cpu) : siblings);
            }
    int count = cores.empty() ? static_cast<int>(std::thread::hardware_concurrency()) : static_cast<int>(cores.size());
    double quota = 0, period = 0;
    std::istringstream limit(first_line_of("/sys/fs/cgroup/cpu.max"));
    if (limit >> quota >> period && period > 0) count = std::min(count, static_cast<int>(std::nearbyint(quota / period)));
    return std::max(1, count);
}

std::string processor_architecture() {
    utsname system{};
    uname(&system);
    std::set<std::string> units;
    std::istringstream flags(cpuinfo({"flags", "Features"}));
    for (std::string name; flags >> name;)
        if (is_vector_unit(name)) units.insert(name);
    std::string name = cpuinfo({"model name"}), listed;
    for (const auto& unit : units) listed += (listed.empty() ? "" : " ") + unit;
    return cat(system.machine, " ", name.empty() ? system.machine : name, " (", listed, ")");
}

}  // namespace dnp::core
