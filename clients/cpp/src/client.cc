#include "safelight/client.h"

#include <openssl/rand.h>

#include <algorithm>
#include <cstdio>

#include "channels.h"
#include "digest.h"
#include "safelight/v1/generation.grpc.pb.h"
#include "safelight/v1/images.grpc.pb.h"
#include "safelight/v1/models.grpc.pb.h"
#include "stream.h"

namespace safelight {
namespace {

/// A random UUID, version 4.
std::string new_request_id() {
  unsigned char b[16];
  if (RAND_bytes(b, sizeof b) != 1) throw std::runtime_error("this machine gives no random bytes");
  b[6] = static_cast<unsigned char>((b[6] & 0x0f) | 0x40);
  b[8] = static_cast<unsigned char>((b[8] & 0x3f) | 0x80);
  char text[37];
  std::snprintf(text, sizeof text, "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b[0], b[1],
                b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]);
  return text;
}

/// Makes a call at the current server; if that cannot be reached, at the next ones in turn.
template <typename Response, typename Ask>
Response ask(Client::Impl& client, Ask call) {
  for (std::size_t left = client.size();; --left) {
    const std::size_t at = client.at();
    grpc::ClientContext context;
    client.authorize(context);
    Response response;
    const grpc::Status status = call(client.channel(at), &context, &response);
    if (status.ok()) return response;
    const Error failure(status);
    if (failure.code() != grpc::UNAVAILABLE || left == 1) throw failure;
    client.next(at);
  }
}

}  // namespace

Stream::Stream(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Stream::Stream(Stream&&) noexcept = default;
Stream& Stream::operator=(Stream&&) noexcept = default;
Stream::~Stream() = default;
std::optional<Event> Stream::next() { return impl_->next(); }
void Stream::close() { impl_->close(); }

Client::Client(const std::string& target, ClientOptions options)
    : impl_(std::make_shared<Impl>(target, std::move(options))) {}
Client::~Client() = default;

Stream Client::generate(v1::GenerateRequest request, std::optional<std::chrono::nanoseconds> timeout) {
  if (request.request_id().empty()) request.set_request_id(new_request_id());
  auto preview = request.has_preview() ? std::optional(request.preview()) : std::nullopt;
  return Stream(std::make_unique<Stream::Impl>(impl_, std::move(request), Received(impl_->at(), std::move(preview), ""),
                                               timeout));
}

Stream Client::watch(std::string generation, std::optional<v1::PreviewPolicy> preview,
                     std::optional<std::chrono::nanoseconds> timeout) {
  Received received(impl_->at(), std::move(preview), std::move(generation));
  return Stream(std::make_unique<Stream::Impl>(impl_, std::nullopt, std::move(received), timeout));
}

v1::Generation Client::get(const std::string& generation) {
  v1::GetGenerationRequest request;
  request.set_name(generation);
  return ask<v1::GetGenerationResponse>(*impl_, [&](auto channel, auto* context, auto* response) {
           return v1::GenerationService::NewStub(channel)->GetGeneration(context, request, response);
         }).generation();
}

v1::Generation Client::cancel(const std::string& generation) {
  v1::CancelGenerationRequest request;
  request.set_name(generation);
  return ask<v1::CancelGenerationResponse>(*impl_, [&](auto channel, auto* context, auto* response) {
           return v1::GenerationService::NewStub(channel)->CancelGeneration(context, request, response);
         }).generation();
}

v1::Image Client::upload_image(const std::string& data) {
  constexpr std::size_t kPieceBytes = 32 << 10;  // the most that a server accepts in one message
  v1::UploadImageRequest first;
  first.set_sha256(sha256(data));
  first.set_total_bytes(static_cast<std::int64_t>(data.size()));
  return ask<v1::UploadImageResponse>(*impl_, [&](auto channel, auto* context, auto* response) {
           const auto stub = v1::ImageService::NewStub(channel);
           const auto upload = stub->UploadImage(context, response);
           bool open = upload->Write(first);  // false if the server has answered already
           for (std::size_t start = 0; open && start < data.size(); start += kPieceBytes) {
             v1::UploadImageRequest piece;
             piece.set_data(data.substr(start, kPieceBytes));
             open = upload->Write(piece);
           }
           upload->WritesDone();
           return upload->Finish();
         }).image();
}

std::vector<v1::Model> Client::models() {
  std::vector<v1::Model> models;
  v1::ListModelsRequest request;
  do {
    const auto page = ask<v1::ListModelsResponse>(*impl_, [&](auto channel, auto* context, auto* response) {
      return v1::ModelService::NewStub(channel)->ListModels(context, request, response);
    });
    models.insert(models.end(), page.models().begin(), page.models().end());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  return models;
}

std::shared_ptr<grpc::Channel> Client::channel() const { return impl_->channel(impl_->at()); }

}  // namespace safelight
