#include "channels.h"

#include <arpa/inet.h>

#include <algorithm>
#include <stdexcept>

namespace safelight {
namespace {

constexpr int kWindowBytes = 64 << 10;  // previews wait at the server, where newer ones replace older ones

std::string trimmed(const std::string& text) {
  const auto first = text.find_first_not_of(" \t\r\n");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

bool starts_with(const std::string& text, const std::string& prefix) { return text.rfind(prefix, 0) == 0; }

bool ends_with(const std::string& text, const std::string& suffix) {
  return text.size() >= suffix.size() && text.compare(text.size() - suffix.size(), suffix.size(), suffix) == 0;
}

/// The host of "host:port", "[v6]:port", "ipv4:host:port" and "dns:///host:port".
std::string host_of(std::string target) {
  for (const std::string scheme : {"dns:///", "dns:", "ipv4:", "ipv6:"}) {
    if (starts_with(target, scheme)) target = target.substr(scheme.size());
  }
  if (starts_with(target, "[")) return target.substr(1, target.find(']') - 1);
  return std::count(target.begin(), target.end(), ':') > 1 ? target : target.substr(0, target.find(':'));
}

grpc::ChannelArguments arguments(const std::string& target, const ClientOptions& options) {
  grpc::ChannelArguments given;
  given.SetUserAgentPrefix("safelight-cpp");
  given.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);  // with the next line: keeps the window from growing
  given.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kWindowBytes);
  // While a stream is open, a frozen server is noticed within 15 seconds, each time it happens.
  given.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  given.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  given.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  given.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  given.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5'000);  // also the time limit for a server's answer to a connection
  given.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2'000);
  given.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // so that a new channel makes a new connection
  given.SetMaxReceiveMessageSize(options.max_message_bytes);
  if (is_local(target)) given.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  if (options.credentials && !options.server_name.empty()) given.SetSslTargetNameOverride(options.server_name);
  return given;
}

}  // namespace

bool is_local(std::string target) {
  if (starts_with(target, "unix:") || starts_with(target, "unix-abstract:")) return true;
  const std::string host = host_of(std::move(target));
  if (host == "localhost" || ends_with(host, ".localhost")) return true;
  in_addr v4;
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return ntohl(v4.s_addr) >> 24 == 127;
  in6_addr v6;
  return inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

Client::Impl::Impl(const std::string& target, ClientOptions options) : options_(std::move(options)) {
  options_.api_key = trimmed(options_.api_key);
  for (const char letter : options_.api_key) {
    if (letter < '!' || letter > '~') throw std::invalid_argument("the API key must be visible ASCII characters");
  }
  for (std::size_t begin = 0, end; begin <= target.size(); begin = end + 1) {
    end = std::min(target.find(',', begin), target.size());
    const std::string one = trimmed(target.substr(begin, end - begin));
    if (one.empty()) throw std::invalid_argument("target \"" + target + "\" names no server");
    targets_.push_back(one);
    channels_.push_back(connect(one));
  }
}

std::shared_ptr<grpc::Channel> Client::Impl::connect(const std::string& target) const {
  const auto credentials = options_.credentials ? options_.credentials : grpc::InsecureChannelCredentials();
  return grpc::CreateCustomChannel(target, credentials, arguments(target, options_));
}

std::shared_ptr<grpc::Channel> Client::Impl::channel(std::size_t index) const {
  std::lock_guard lock(mutex_);
  return channels_[index];
}

void Client::Impl::give_up(std::size_t index, const std::shared_ptr<grpc::Channel>& old) {
  std::lock_guard lock(mutex_);
  if (channels_[index] == old) channels_[index] = connect(targets_[index]);
}

std::size_t Client::Impl::next(std::size_t failed) {
  const std::size_t after = (failed + 1) % size();
  at_.compare_exchange_strong(failed, after);
  return after;
}

void Client::Impl::authorize(grpc::ClientContext& context) const {
  if (!options_.api_key.empty()) context.AddMetadata("authorization", "Bearer " + options_.api_key);
}

}  // namespace safelight
