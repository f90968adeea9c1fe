/// The common part of the runners of the C++ and the C client.
#pragma once

#include <chrono>
#include <cstdint>
#include <fstream>
#include <future>
#include <iomanip>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>
#include <openssl/evp.h>

namespace runner {

using nlohmann::json;

inline std::chrono::milliseconds seconds(const json& s) {
  return std::chrono::milliseconds(static_cast<long>(s.get<double>() * 1000));
}

/// Microseconds since 1970, by this machine's clock.
inline std::int64_t now_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

inline std::string sha256(const std::string& data) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  EVP_Digest(data.data(), data.size(), digest, &size, EVP_sha256(), nullptr);
  std::ostringstream text;
  for (unsigned int i = 0; i < size; ++i) text << std::hex << std::setw(2) << std::setfill('0') << int{digest[i]};
  return text.str();
}

inline std::string contents(const std::string& file) {
  std::ifstream opened(file);
  return {std::istreambuf_iterator<char>(opened), {}};
}

inline std::string targets(const json& given) {
  std::string joined;
  for (const std::string one : given["targets"]) joined += (joined.empty() ? "" : ",") + one;
  return joined;
}

/// The outcome of a generation that a runner prints, before anything was received.
inline json nothing_seen() {
  return {{"code", "OK"},           {"reason", ""},           {"violations", json::object()},
          {"retry_after_s", nullptr}, {"generation", ""},       {"reliable", json::array()},
          {"steps", json::array()}, {"previews", json::array()}, {"pictures", json::array()},
          {"num_steps", 0},         {"cancelled", nullptr},   {"watched", nullptr},
          {"received_us", json::array()}};
}

/// Runs all requests of a case at once, each on a thread, and returns what the runner prints.
template <typename Generate>
json all_at_once(const json& given, Generate generate) {
  std::vector<std::future<json>> all;
  for (const json& request : given["requests"]) {
    all.push_back(std::async(std::launch::async, [&] { return generate(request); }));
  }
  json generations = json::array();
  for (auto& one : all) generations.push_back(one.get());
  return {{"case", given["name"]}, {"generations", generations}};
}

}  // namespace runner
