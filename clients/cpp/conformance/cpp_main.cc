// The runner of the C++ client: reads cases, runs them, and prints the outcomes, a JSON object a line each.
//
// See clients/CONFORMANCE.md.
#include <iostream>
#include <map>
#include <thread>

#include <google/protobuf/util/json_util.h>

#include "runner.h"
#include "safelight/client.h"

namespace {

using nlohmann::json;
using safelight::Client;
using runner::seconds;
using runner::sha256;
namespace v1 = safelight::v1;

v1::GenerateRequest parsed(const json& request) {
  v1::GenerateRequest message;
  const auto status = google::protobuf::util::JsonStringToMessage(request.dump(), &message);
  if (!status.ok()) throw std::runtime_error(status.ToString());
  return message;
}

json described(const safelight::Image& image) {
  return {{"output_index", image.output_index}, {"media_type", image.media_type}, {"width_px", image.width_px},
          {"height_px", image.height_px},       {"stride_bytes", image.stride_bytes}};
}

/// Cancels a generation and returns its final state.
json cancelled(Client& client, const std::string& name) {
  const v1::Generation ended = client.cancel(name);
  json steps = json::array();
  for (const auto& output : ended.outputs()) steps.push_back(output.step());
  return {{"state", v1::Generation::State_Name(ended.state())}, {"steps", steps}};
}

/// Watches a generation again: the events, and what the server reports about the generation and its models.
json watched_again(Client& client, const std::string& name) {
  json reliable = json::array(), models = json::array(), sums = json::array();
  std::map<int, std::string> sum_of;
  v1::PreviewPolicy none;
  none.set_method(v1::PREVIEW_METHOD_NONE);
  for (const safelight::Event& event : client.watch(name, none)) {
    if (std::get_if<safelight::Accepted>(&event)) reliable.push_back("accepted");
    if (std::get_if<safelight::Finished>(&event)) reliable.push_back("finished");
    if (const auto* picture = std::get_if<safelight::Picture>(&event)) {
      reliable.push_back("picture");
      sum_of[picture->output_index] = sha256(picture->data);
    }
  }
  for (const auto& [index, sum] : sum_of) sums.push_back(sum);
  const std::string state = v1::Generation::State_Name(client.get(name).state());
  for (const v1::Model& model : client.models()) models.push_back(model.name());
  return {{"reliable", reliable}, {"sha256", sums}, {"state", state}, {"models", models}};
}

json generate(Client& client, const json& given, const json& request) {
  json seen = runner::nothing_seen();
  std::optional<std::chrono::nanoseconds> timeout;
  if (given["timeout_s"] > 0) timeout = seconds(given["timeout_s"]);
  const int cancel_at = given["cancel_at_step"];
  const bool measures = given["measure"];
  std::vector<std::int64_t> received_us;
  try {
    v1::GenerateRequest message = parsed(request);
    if (const std::string file = given["init_image_file"]; !file.empty()) {
      message.mutable_spec()->set_init_image(client.upload_image(runner::contents(file)).name());
      message.mutable_spec()->set_mask(client.upload_image(runner::contents(given["mask_file"])).name());
    }
    if (const json& interval = given["guidance_interval"]; !interval.empty()) {
      message.mutable_spec()->mutable_guidance_interval()->set_start(interval[0]);
      message.mutable_spec()->mutable_guidance_interval()->set_end(interval[1]);
      message.mutable_spec()->set_guidance_rescale(given["guidance_rescale"]);
    }
    if (const int steps = given["min_num_steps"]; steps > 0) message.mutable_quality_floor()->set_min_num_steps(steps);
    for (const safelight::Event& event : client.generate(message, timeout)) {
      if (const auto* accepted = std::get_if<safelight::Accepted>(&event)) {
        seen["generation"] = accepted->generation;
        seen["reliable"].push_back("accepted");
      } else if (const auto* progress = std::get_if<safelight::Progress>(&event)) {
        seen["steps"].push_back({progress->output_index(), progress->step()});
        if (cancel_at > 0 && progress->step() >= cancel_at && seen["cancelled"].is_null()) {
          seen["cancelled"] = cancelled(client, seen["generation"]);
        }
      } else if (std::holds_alternative<safelight::Preview>(event) && measures) {
        received_us.push_back(runner::now_us());
      } else if (const auto* preview = std::get_if<safelight::Preview>(&event)) {
        seen["previews"].push_back(described(*preview));
        seen["previews"].back().update(
            {{"step", preview->step}, {"num_bytes", preview->data.size()}, {"num_dropped", preview->num_dropped}});
        std::this_thread::sleep_for(seconds(given["pause_s"]));
      } else if (const auto* picture = std::get_if<safelight::Picture>(&event)) {
        seen["reliable"].push_back("picture");
        seen["pictures"].push_back(described(*picture));
        seen["pictures"].back().update({{"seed", std::to_string(picture->seed)}, {"sha256", sha256(picture->data)}});
      } else if (const auto* finished = std::get_if<safelight::Finished>(&event)) {
        seen["reliable"].push_back("finished");
        seen["num_steps"] = finished->details.usage().num_steps();
      }
    }
    if (given["watch_again"]) seen["watched"] = watched_again(client, seen["generation"]);
  } catch (const safelight::Error& failure) {
    seen["code"] = safelight::code_name(failure.code());
    seen["reason"] = failure.reason();
    seen["violations"] = failure.violations();
    seen["message"] = failure.what();
    if (failure.retry_after()) {
      seen["retry_after_s"] = std::chrono::duration<double>(*failure.retry_after()).count();
    }
  }
  seen["received_us"] = received_us;
  return seen;
}

json run(const json& given) {
  safelight::ClientOptions options;
  options.api_key = given["api_key"];
  options.patience = seconds(given["patience_s"]);
  options.retries = given["retries"];
  if (const int bytes = given["max_message_bytes"]; bytes > 0) options.max_message_bytes = bytes;
  if (const std::string file = given["ca_file"]; !file.empty()) {
    grpc::SslCredentialsOptions tls;
    tls.pem_root_certs = runner::contents(file);
    if (const std::string cert = given["cert_file"]; !cert.empty()) {
      tls.pem_cert_chain = runner::contents(cert);
      tls.pem_private_key = runner::contents(given["key_file"]);
    }
    options.credentials = grpc::SslCredentials(tls);
    options.server_name = given["server_name"];
  }
  Client client(runner::targets(given), options);
  return runner::all_at_once(given, [&](const json& request) { return generate(client, given, request); });
}

}  // namespace

int main() {
  for (std::string line; std::getline(std::cin, line);) std::cout << run(json::parse(line)).dump() << std::endl;
}
