// The runner of the C client: as cpp_main.cc, but it uses only the functions of safelight.h.
//
// See clients/CONFORMANCE.md.
#include <cstdint>
#include <iostream>
#include <map>
#include <memory>
#include <thread>

#include "runner.h"
#include "safelight.h"

namespace {

using nlohmann::json;

template <typename Handle>
std::shared_ptr<Handle> held(Handle* handle, void (*free)(Handle*)) {
  if (!handle) throw std::runtime_error("no handle");
  return {handle, free};
}

/// Parses a text of the library as JSON, and frees the text.
json taken(char* text) {
  if (!text) throw std::runtime_error("no text");
  const json parsed = json::parse(text);
  safelight_text_free(text);
  return parsed;
}

json described(const safelight_image* image, std::int32_t output_index) {
  return {{"output_index", output_index},
          {"media_type", safelight_image_media_type(image)},
          {"width_px", safelight_image_width_px(image)},
          {"height_px", safelight_image_height_px(image)},
          {"stride_bytes", safelight_image_stride_bytes(image)}};
}

std::string bytes_of(const safelight_image* image) {
  std::size_t num_bytes = 0;
  const auto* data = safelight_image_data(image, &num_bytes);
  return std::string(reinterpret_cast<const char*>(data), num_bytes);
}

json cancelled(safelight_generation* generation) {
  const json ended = taken(safelight_generation_cancel(generation, nullptr));
  json steps = json::array();
  for (const json& output : ended["outputs"]) steps.push_back(output["step"]);
  return {{"state", ended["state"]}, {"steps", steps}};
}

/// Watches a generation again: the events, and what the server reports about the generation and its models.
json watched_again(safelight_client* client, const std::string& name) {
  json reliable = json::array(), models = json::array(), sums = json::array();
  std::map<std::int32_t, std::string> sum_of;
  const auto watched = held(safelight_watch(client, name.c_str(), nullptr, 0, nullptr), safelight_generation_free);
  while (safelight_event* next = safelight_generation_next(watched.get(), -1)) {
    const auto event = held(next, safelight_event_free);
    const auto kind = safelight_event_get_kind(event.get());
    if (kind == SAFELIGHT_EVENT_ACCEPTED) reliable.push_back("accepted");
    if (kind == SAFELIGHT_EVENT_FINISHED) reliable.push_back("finished");
    if (kind == SAFELIGHT_EVENT_PICTURE) {
      reliable.push_back("picture");
      sum_of[safelight_event_output_index(event.get())] = runner::sha256(bytes_of(safelight_event_image(event.get())));
    }
  }
  for (const auto& [index, sum] : sum_of) sums.push_back(sum);
  const json known = taken(safelight_client_get(client, name.c_str(), nullptr));
  const json all = taken(safelight_client_models(client, nullptr));
  for (const json& model : all["models"]) models.push_back(model["name"]);
  return {{"reliable", reliable}, {"sha256", sums}, {"state", known["state"]}, {"models", models}};
}

void see(json& seen, const safelight_event* event, const json& given, safelight_generation* generation) {
  const std::int32_t index = safelight_event_output_index(event), step = safelight_event_step(event);
  const safelight_image* image = safelight_event_image(event);
  switch (safelight_event_get_kind(event)) {
    case SAFELIGHT_EVENT_ACCEPTED:
      seen["generation"] = safelight_generation_name(generation);
      seen["reliable"].push_back("accepted");
      break;
    case SAFELIGHT_EVENT_PROGRESS:
      seen["steps"].push_back({index, step});
      if (given["cancel_at_step"] > 0 && step >= given["cancel_at_step"] && seen["cancelled"].is_null()) {
        seen["cancelled"] = cancelled(generation);
      }
      break;
    case SAFELIGHT_EVENT_PREVIEW:
      if (given["measure"]) {
        seen["received_us"].push_back(runner::now_us());
        break;
      }
      seen["previews"].push_back(described(image, index));
      seen["previews"].back().update({{"step", step},
                                      {"num_bytes", bytes_of(image).size()},
                                      {"num_dropped", safelight_event_num_dropped(event)}});
      std::this_thread::sleep_for(runner::seconds(given["pause_s"]));
      break;
    case SAFELIGHT_EVENT_PICTURE:
      seen["reliable"].push_back("picture");
      seen["pictures"].push_back(described(image, index));
      seen["pictures"].back().update(
          {{"seed", std::to_string(safelight_image_seed(image))}, {"sha256", runner::sha256(bytes_of(image))}});
      break;
    case SAFELIGHT_EVENT_FINISHED:
      seen["reliable"].push_back("finished");
      seen["num_steps"] = std::stoll(json::parse(safelight_event_json(event))["usage"]["numSteps"].get<std::string>());
      break;
  }
}

/// Uploads the picture in a file and returns its name.
std::string uploaded(safelight_client* client, const std::string& file) {
  const std::string data = runner::contents(file);
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(data.data());
  char* name = safelight_client_upload_image(client, bytes, data.size(), nullptr);
  if (!name) throw std::runtime_error("the server did not take the picture");
  const std::string copy = name;
  safelight_text_free(name);
  return copy;
}

json generate(safelight_client* client, const json& given, const json& request) {
  json seen = runner::nothing_seen();
  const auto message = held(safelight_request_from_json(request.dump().c_str(), nullptr), safelight_request_free);
  if (const std::string file = given["init_image_file"]; !file.empty()) {
    safelight_request_set_init_image(message.get(), uploaded(client, file).c_str());
    safelight_request_set_mask(message.get(), uploaded(client, given["mask_file"]).c_str());
  }
  if (const json& interval = given["guidance_interval"]; !interval.empty()) {
    safelight_request_set_guidance_interval(message.get(), interval[0], interval[1]);
    safelight_request_set_guidance_rescale(message.get(), given["guidance_rescale"]);
  }
  if (const int steps = given["min_num_steps"]; steps > 0) safelight_request_set_quality_floor(message.get(), steps, 0, 0);
  const auto generation =
      held(safelight_generate(client, message.get(), given["timeout_s"], nullptr), safelight_generation_free);
  while (safelight_event* next = safelight_generation_next(generation.get(), -1)) {
    const auto event = held(next, safelight_event_free);
    see(seen, event.get(), given, generation.get());
  }
  if (const safelight_error* failure = safelight_generation_error(generation.get())) {
    seen["code"] = safelight_error_code_name(failure);
    seen["reason"] = safelight_error_reason(failure);
    seen["message"] = safelight_error_message(failure);
    for (std::int32_t i = 0; i < safelight_error_num_violations(failure); ++i) {
      seen["violations"][safelight_error_violation_field(failure, i)] = safelight_error_violation_description(failure, i);
    }
    if (safelight_error_retry_after_s(failure) >= 0) seen["retry_after_s"] = safelight_error_retry_after_s(failure);
  } else if (given["watch_again"]) {
    seen["watched"] = watched_again(client, seen["generation"]);
  }
  return seen;
}

json run(const json& given) {
  const auto options = held(safelight_options_new(), safelight_options_free);
  safelight_options_set_api_key(options.get(), given["api_key"].get<std::string>().c_str());
  safelight_options_set_patience_s(options.get(), given["patience_s"]);
  safelight_options_set_retries(options.get(), given["retries"]);
  if (const std::string file = given["ca_file"]; !file.empty()) {
    safelight_options_set_tls(options.get(), runner::contents(file).c_str(),
                              given["server_name"].get<std::string>().c_str());
    if (const std::string cert = given["cert_file"]; !cert.empty()) {
      safelight_options_set_certificate(options.get(), runner::contents(cert).c_str(),
                                        runner::contents(given["key_file"]).c_str());
    }
  }
  if (const std::int32_t bytes = given["max_message_bytes"]; bytes > 0) {
    safelight_options_set_max_message_bytes(options.get(), bytes);
  }
  const auto client = held(safelight_client_new(runner::targets(given).c_str(), options.get(), nullptr),
                           safelight_client_free);
  return runner::all_at_once(given, [&](const json& request) { return generate(client.get(), given, request); });
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) std::cout << run(json::parse(line)).dump() << std::endl;
}
