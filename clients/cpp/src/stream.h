/// Follows one generation over as many connections as necessary.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>

#include "channels.h"
#include "received.h"
#include "safelight/client.h"

namespace safelight {

using Clock = std::chrono::steady_clock;

class Stream::Impl {
 public:
  /// `request`: absent to watch an existing generation.
  Impl(std::shared_ptr<Client::Impl> client, std::optional<v1::GenerateRequest> request, Received received,
       std::optional<std::chrono::nanoseconds> timeout);
  ~Impl();

  std::optional<Event> next();
  void close();

 private:
  /// One connection: a Generate or a WatchGeneration.
  struct Call {
    grpc::ClientContext context;
    std::function<bool(v1::GenerationEvent&)> read;
    std::function<grpc::Status()> finish;
  };

  void open();
  grpc::Status finish();
  void wait_to_retry(const Error& failure);

  const std::shared_ptr<Client::Impl> client_;
  const std::optional<v1::GenerateRequest> request_;
  Received received_;
  std::shared_ptr<grpc::Channel> channel_;  ///< The channel of the present or last connection.
  const std::optional<Clock::time_point> deadline_;
  int tries_ = 0;
  int refusals_ = 0;
  int drains_ = 0;
  std::uint64_t num_events_ = 0;  ///< Number of events received before the present connection.
  Clock::time_point give_up_at_;
  bool ended_ = false;

  std::mutex mutex_;  ///< Protects the two members below, which close() uses.
  std::condition_variable closing_;
  bool closed_ = false;
  std::unique_ptr<Call> call_;
};

}  // namespace safelight
