/// The channels of a client, and which server new calls use.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <grpcpp/grpcpp.h>

#include "safelight/client.h"

namespace safelight {

/// Whether a gRPC target is on this machine: a unix socket, localhost or a loopback address.
bool is_local(std::string target);

class Client::Impl {
 public:
  Impl(const std::string& target, ClientOptions options);

  std::size_t size() const { return targets_.size(); }
  std::size_t at() const { return at_; }
  std::shared_ptr<grpc::Channel> channel(std::size_t index) const;
  std::chrono::nanoseconds patience() const { return options_.patience; }
  int retries() const { return options_.retries; }

  /// The server to use after one that failed. Generations that lose a server at the same time move to the same next one,
  /// and only the first of them changes the server of new calls.
  std::size_t next(std::size_t failed);

  /// Makes new calls use a new connection, which a load balancer may lead to another server. Open calls stay on the old
  /// connection, which ends with the last of them. Generations that are refused at the same time replace it only once.
  void give_up(std::size_t index, const std::shared_ptr<grpc::Channel>& old);

  void authorize(grpc::ClientContext& context) const;

 private:
  std::shared_ptr<grpc::Channel> connect(const std::string& target) const;

  ClientOptions options_;
  std::vector<std::string> targets_;
  mutable std::mutex mutex_;  ///< Protects the next member.
  std::vector<std::shared_ptr<grpc::Channel>> channels_;
  std::atomic<std::size_t> at_{0};
};

}  // namespace safelight
